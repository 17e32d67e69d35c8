"""`--prompt-type hf`: dialogues written by the tokenizer's own chat template.

The whole text is tokenized at once, as a server does. What is trained is what the template marks by
`{% generation %}`, or else, for each answer, the text that it adds to the prompt before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tessel.data.instruct.dialogue import ANSWERING, FUNCTION, OBSERVATION, Dialogue, Example, Message
from tessel.data.instruct.rendering import Rendered, RenderOptions
from tessel.data.instruct.shorten import IGNORED
from tessel.data.instruct.tools import parse_calls, parse_tools
from tessel.data.instruct.vocabulary import Vocabulary, hf_of, plain_vocabulary
from tessel.data.tokenizer import Tokenizer
from tessel.errors import TesselError
from tessel.runtime.log import warn_once

_GENERATION = re.compile(r"\{%-?\s*generation\b")
Span = tuple[int, int]
"""Characters [first, end) of a text."""


class _Written(NamedTuple):
    """A dialogue as text, and which of it is trained."""

    text: str
    spans: list[Span]


class ChatRenderer:
    """A `Renderer` by the chat template of the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, options: RenderOptions) -> None:
        self._hf = hf_of(tokenizer)
        if not self._hf.chat_template:
            raise TesselError(
                f"The tokenizer {tokenizer.source} has no chat template, which --prompt-type hf is; name a prompt type "
                "(`tessel templates` lists them)."
            )
        self.options = options
        self.vocabulary: Vocabulary = plain_vocabulary(tokenizer)
        self._backend: Any = getattr(self._hf, "backend_tokenizer", None)
        if self._backend is None:
            raise TesselError(
                f"The tokenizer {tokenizer.source} is one written in Python, which does not say where in the text a "
                "token stands, as --prompt-type hf needs; use its fast form (tokenizer.json)."
            )
        self._marks = _GENERATION.search(str(self._hf.chat_template)) is not None

    def dialogues(self, dialogues: Sequence[Dialogue]) -> list[Rendered]:
        """See `Renderer`."""
        return self._render([self._written(dialogue, self.options.mask_history) for dialogue in dialogues])

    def preferences(self, examples: Sequence[Example]) -> list[Rendered]:
        """See `Renderer`."""
        both = [example.dialogue(answer) for example in examples for answer in (0, 1)]
        return self._render([self._written(dialogue, last_only=True) for dialogue in both])

    def prompts(self, dialogues: Sequence[Dialogue]) -> list[np.ndarray]:
        """See `Renderer`."""
        texts = [self.text(dialogue, asks=True) for dialogue in dialogues]
        return [np.array(ids, np.int32) for ids in self.vocabulary.encoder(texts)]

    def text(self, dialogue: Dialogue, asks: bool = False) -> str:
        """The dialogue as the chat template writes it; up to where the assistant answers if `asks`.

        Raises:
            TesselError: the template refuses the dialogue; says why.
        """
        return self._apply(self._messages(dialogue), dialogue.tools, asks)

    def _messages(self, dialogue: Dialogue) -> list[dict[str, Any]]:
        messages = [_message(message) for message in dialogue.messages]
        return [{"role": "system", "content": dialogue.system}, *messages] if dialogue.system else messages

    def _apply(self, messages: list[dict[str, Any]], tools: str, asks: bool, **more: Any) -> Any:
        arguments: dict[str, Any] = dict(more)
        if tools:
            arguments["tools"] = [{"type": "function", "function": function} for function in parse_tools(tools)]
        if self.options.thinking is not None:
            arguments["enable_thinking"] = self.options.thinking
        if self.options.effort is not None:
            arguments["reasoning_effort"] = self.options.effort
        try:
            return self._hf.apply_chat_template(
                messages, add_generation_prompt=asks, tokenize=bool(more), **arguments
            )  # fmt: skip
        except Exception as error:  # A template may raise anything, in words meant for the user.
            raise TesselError(f"the chat template refuses the dialogue: {error}") from error

    def _written(self, dialogue: Dialogue, last_only: bool) -> _Written:
        messages = self._messages(dialogue)
        text = self._apply(messages, dialogue.tools, asks=False)
        _check_written(dialogue, text, self.options)
        if self.options.train_on_prompt:
            return _Written(text, [(0, len(text))])
        if self._marks:
            spans = self._marked(messages, dialogue.tools, text)
        else:
            spans = self._by_prefixes(messages, dialogue, text, last_only)
        return _Written(text, spans[-1:] if last_only else spans)

    def _marked(self, messages: list[dict[str, Any]], tools: str, text: str) -> list[Span]:
        """What the template itself marks."""
        answer = self._apply(messages, tools, False, return_dict=True, return_assistant_tokens_mask=True)
        encoding = self._backend.encode(text, add_special_tokens=False)
        trained = answer["assistant_masks"]
        if list(answer["input_ids"]) != encoding.ids:
            raise TesselError("the chat template's own tokens are not those of its text")
        spans: list[Span] = []
        for (first, end), is_trained, before in zip(encoding.offsets, trained, [0, *trained], strict=False):
            if is_trained and before:
                spans[-1] = (spans[-1][0], end)
            elif is_trained:
                spans.append((first, end))
        return spans

    def _by_prefixes(
        self, messages: list[dict[str, Any]], dialogue: Dialogue, text: str, last_only: bool
    ) -> list[Span]:
        """For each answer what it adds to the prompt before it.

        Raises:
            TesselError: the template writes what came before otherwise when more follows, as those do that leave
                thoughts out.
        """
        spans: list[Span] = []
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in answers[-1:] if last_only else answers:
            prompt = self._apply(messages[:i], dialogue.tools, asks=True)
            is_last = i + 1 == len(messages)
            whole = text if is_last else self._apply(messages[: i + 1], dialogue.tools, asks=False)
            if not whole.startswith(prompt):
                # What is written before an answer may depend on the answer: its empty thought, say.
                prompt = _common(prompt, whole)
                bare = self._apply(messages[:i], dialogue.tools, asks=False)
                if not whole.startswith(bare) or len(prompt) < len(bare):
                    raise _unstable(i)
            if not text.startswith(whole):
                raise _unstable(i)
            spans.append((len(prompt), len(whole)))
        return spans

    def _render(self, written: Sequence[_Written]) -> list[Rendered]:
        """Each text is tokenized whole, and in the pieces that spans cut it into: mostly these are the same tokens."""
        pieces = [_pieces(one) for one in written]
        texts = [one.text for one in written] + [piece for own in pieces for piece, _ in own]
        tokens, lengths = self.vocabulary.encoder.encode_flat(texts)
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        at, start = len(written), 0
        rendered = []
        for one, own, stop in zip(written, pieces, ends, strict=False):
            ids, counts = tokens[start:stop], lengths[at : at + len(own)]
            first = ends[at - 1] if at else 0
            start, at = stop, at + len(own)
            if np.array_equal(ids, tokens[first : first + int(counts.sum())]):
                trained = np.repeat(np.array([is_trained for _, is_trained in own], bool), counts)
            else:
                trained = self._within(one)
            rendered.append(self._rendered(ids, trained))
        return rendered

    def _within(self, one: _Written) -> np.ndarray:
        """bool[N]: the tokens that lie wholly within a span."""
        offsets = np.array(self._backend.encode(one.text, add_special_tokens=False).offsets, np.int64).reshape(-1, 2)
        trained = np.zeros(len(offsets), bool)
        for first, last in one.spans:
            trained |= (offsets[:, 0] >= first) & (offsets[:, 1] <= last)
        return trained

    def _rendered(self, ids: np.ndarray, trained: np.ndarray) -> Rendered:
        most = self.options.max_tokens
        ids, labels = ids[:most], np.where(trained, ids, np.int32(IGNORED))[:most]
        if self.options.append_eod and self.vocabulary.eod is not None:
            end = np.array([self.vocabulary.eod], np.int32)
            ids, labels = np.concatenate([ids, end]), np.concatenate([labels, end])
        return Rendered(ids, labels)


def _pieces(one: _Written) -> list[tuple[str, bool]]:
    """The text cut at the borders of its spans, and whether each piece is trained."""
    pieces, at = [], 0
    for first, end in one.spans:
        pieces += [(one.text[at:first], False), (one.text[first:end], True)]
        at = end
    return [(piece, is_trained) for piece, is_trained in [*pieces, (one.text[at:], False)] if piece]


def _check_written(dialogue: Dialogue, text: str, options: RenderOptions) -> None:
    """A template that knows no functions or thoughts leaves them out without a word: another answer would be trained.

    Thoughts of earlier answers are left out on purpose.
    """
    thought = dialogue.messages[-1].thought if dialogue.messages else ""
    if thought and thought not in text and options.thinking is not False:
        raise TesselError("the chat template leaves out the thought of the last answer; name a prompt type")
    for message in dialogue.messages:
        for call in parse_calls(message.content) if message.role == FUNCTION else ():
            if call.name not in text:
                raise TesselError(
                    f"the chat template leaves out the function call {call.name!r}; name a prompt type that writes it"
                )
    for function in parse_tools(dialogue.tools) if dialogue.tools else ():
        if function["name"] not in text:
            warn_once("the chat template leaves out the tools of the rows: the model is not told of them")


def _unstable(i: int) -> TesselError:
    return TesselError(
        f"the chat template writes message {i + 1} otherwise when more follows, so that what is trained cannot be "
        "told; train the last answer alone (--mask-history), or name a prompt type"
    )


def _common(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _message(message: Message) -> dict[str, Any]:
    """A message in the words of chat templates."""
    if message.role == FUNCTION:
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in parse_calls(message.content)
        ]
        written: dict[str, Any] = {"role": "assistant", "content": message.said, "tool_calls": calls}
    else:
        role = "assistant" if message.role in ANSWERING else "tool" if message.role == OBSERVATION else message.role
        written = {"role": role, "content": message.content}
    if message.thought:
        written["reasoning_content"] = message.thought
    return written
