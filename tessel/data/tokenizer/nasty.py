"""Texts that tokenizers tend to get wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers


def nasty_texts(backend: tokenizers.Tokenizer) -> list[str]:
    """Texts that tokenizers tend to get wrong, special tokens of this one among them."""
    specials = [token.content for token in backend.get_added_tokens_decoder().values()][:64]
    return [*_FIXED, *_long(), *_around(specials), *_random(specials)]


# Control characters, white space of all kinds, digits, contractions, combining marks, emoji with joiners
# and modifiers, flags, scripts from right to left and without spaces, private use, noncharacters.
_FIXED = (
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "\n",
    "\n\n",
    " \n \n",
    "\r\n\r\n",
    "\t\tx",
    "a\x00b",
    "\x00",
    "\x01\x02\x1b[0m\x7f",
    "two  spaces   three    four",
    "x\u00a0y\u2003z\u3000w\u2028v\u2029u\u0085t\u000bs\u1680r\u180eq",
    "\ufeffmark",
    "zero\u200bwidth",
    "1 12 123 1234 12345 1234567890",
    "3.14 -2e10 0x1F 1,000,000",
    "\u0661\u0662\u0663 \u096a\u096b \u00b2\u00b3\u00bd \u2167 \U0001d7ce",
    "I'm you're we've he'll she'd it's IT'S WE'LL o\u2019clock '\u017f 'S 'LL",
    "camelCaseWordsHTTPServer snake_case __init__",
    "caf\u00e9 cafe\u0301 \u1e69 s\u0323\u0307 \u212b \ufb01 \u1100\u1161\u11a8 \uac01",
    "\u0301\u0302 alone",
    "Z\u0334\u0317\u0349a\u0335l\u0336g\u0337o",
    "\U0001f469\u200d\U0001f4bb\U0001f468\u200d\U0001f469\u200d\U0001f467",
    " \U0001f44d\U0001f3fd \u2764\ufe0f \U0001f1e9\U0001f1ea \U0001f3f4\U000e0067\U000e007f",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u300c\u5f15\u7528\u300d\uff11\uff12",
    " \u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8 \ud55c\uad6d\uc5b4 \U00020000\U0002a6d6",
    "\u0645\u0631\u062d\u0628\u0627",
    " \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u05e9\u05dc\u05d5\u05dd \u202ertl\u202c \u200f\u061c",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947 \u0b9a",
    "\ue000\uf8ff\U000f0000\U0010fffd",
    "\ufffd\ufffe\uffff\U0001fffe\U0010ffff",
    "\u0130\u0131 STRASSE stra\u00dfe \u01c5 \u03a3\u03c3\u03c2",
    "!?.,;:...---___***###",
    'http://a.b/c?d=e&f=%20#g <b>x</b> {"k": [1, 2]}',
    "def f(x):\n    return x\n\n\nclass A:\n\tpass\n",
    "\u2581\u2581a \u2581b \u0120c \u010ad \u0100",
    "<0x0A><unk><s></s>[INST]",
)


def _long() -> list[str]:
    """Words, white space and lines beyond the sizes that anything is tuned for."""
    runs = ("a", " ", "\n", "\u4e2d", "7", "!", "ab", " \n", "\t ", "\U0001f600", "\u0301")
    return [run * count for run in runs for count in (5, 64, 1025)] + ["x" * 5000 + " y" + " " * 3000 + "z"]


def _around(specials: Sequence[str]) -> Iterator[str]:
    """Special tokens spelled out, next to each other, to text and to white space, and cut short."""
    for token in specials:
        yield from (token, f"a{token}b", f" {token} \n{token}{token}", token[:-1], f"{token[0]}{token}")


def _random(specials: Sequence[str]) -> Iterator[str]:
    """Always the same random characters: of all of Unicode, of its first part, and of a mixture of what is hard."""
    random_ = random.Random(20)
    hard = [*"aZ's1 .\n\t\r\x00\u00a0\u0301\u200d\ufe0f\u4e2d\u0645\u0915\ue000\U0001f600", "  ", "\n\n", *specials[:8]]
    for i in range(240):
        if i % 3 == 2:
            yield "".join(random_.choices(hard, k=60))
            continue
        codes = (random_.randrange(0x110000 if i % 3 else 0x3000) for _ in range(60))
        yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
