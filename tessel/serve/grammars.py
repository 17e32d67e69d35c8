"""Answers that are held to a form, token by token, by llguidance: JSON, JSON of a schema, calls of functions.

JSON is written as `json.dumps` writes it, without line breaks, as chat templates write calls: a model that may choose
among white space can go on with it for ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from tessel.data.instruct.dialogue import FUNCTION, OBSERVATION, USER, Dialogue, Message
from tessel.data.instruct.vocabulary import hf_of
from tessel.errors import TesselError
from tessel.generate.dialogues import ChatTemplate
from tessel.generate.load import Opened
from tessel.serve.errors import ApiError
from tessel.serve.protocol import Function
from tessel.serve.toolcalls import BEGIN, END

_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_EXAMPLE = f'{BEGIN}\n{{"name": "f", "arguments": {{}}}}\n{END}'


class Grammars:
    """Grammars for one model. Its tokenizer is read when the first is asked for, which may take a second."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        opened = self._opened
        ends = sorted(opened.stop_ids) or None
        return from_tokenizer(hf_of(opened.tokenizer), n_vocab=opened.config.vocab_size, eos_token=ends)

    def of_json(self, schema: dict[str, Any] | None, param: str) -> str:
        """JSON of a schema; without one, any object.

        Raises:
            ApiError: it is no schema, or one that cannot be held to.
        """
        return self._checked(LLMatcher.grammar_from_json_schema(schema or {"type": "object"}, overrides=_STYLE), param)

    def of_call(self, functions: Sequence[Function], template: ChatTemplate, param: str) -> str:
        """A call of one of some functions, as Qwen and Hermes write it, with arguments of its parameters' schema.

        Raises:
            ApiError: the template writes calls otherwise, or parameters are no schema.
        """
        if not self._writes_calls(template):
            raise ApiError(400, f"The model cannot be made to call: {template.source} writes calls otherwise.", param)
        names = " | ".join(f"call_{number}" for number in range(len(functions)))
        lines = [f"start: {json.dumps(BEGIN + chr(10))} ({names}) {json.dumps(chr(10) + END)}"]
        for number, function in enumerate(functions):
            head = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": '
            schema = function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
            lines += [
                f'call_{number}: {json.dumps(head)} arguments_{number} "}}"',
                f"arguments_{number}: %json {json.dumps({**schema, 'x-guidance': _STYLE})}",
            ]
        return self._checked(LLMatcher.grammar_from_lark("\n".join(lines)), param)

    def _writes_calls(self, template: ChatTemplate) -> bool:
        call = Message(FUNCTION, '[{"name": "f", "arguments": {}}]')
        dialogue = Dialogue((Message(USER, "x"), call, Message(OBSERVATION, "y")))
        try:
            return _EXAMPLE in self._opened.tokenizer.decode(template.prompt(dialogue))
        except TesselError:
            return False

    def _checked(self, grammar: str, param: str) -> str:
        try:
            problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        except (TesselError, ValueError) as error:  # of the tokenizer
            raise ApiError(400, f"This model's answers cannot be held to a form: {error}", param) from error
        if problem and not problem.startswith("WARNING"):
            raise ApiError(400, f"The answer cannot be held to this form: {problem}.", param, "invalid_value")
        return grammar

    def guide(self, grammar: str) -> Guide:
        """What holds a text to a grammar that was checked."""
        return Guide(self._tokenizer, grammar)


class Guide:
    """Holds one text to its grammar; see `tessel.generate.request.Guide`."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._mask = allocate_token_bitmask(1, tokenizer.vocab_size)

    def allowed(self, logits_V: Tensor) -> Tensor:
        """Logits with -inf for tokens that cannot come next; as they are where none can."""
        fill_next_token_bitmask(self._matcher, self._mask)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(logits_V)].astype(bool)
        if not bits.any():
            return logits_V
        return logits_V.masked_fill(torch.from_numpy(~bits).to(logits_V.device), float("-inf"))

    def take(self, token: int) -> bool:
        """Go on with a token; whether the text is whole then."""
        return not self._matcher.consume_token(token) or self._matcher.is_stopped()
