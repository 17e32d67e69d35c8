"""Dialogues of Hunyuan-Large: written by its tokenizer's chat template, answers trained from mark to mark.

Source of the rules: MindSpeed-LLM's HunyuanInstructionHandler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tessel.data.encoding import Encoded
from tessel.data.instruct.chat import ChatRenderer
from tessel.data.instruct.converters import Dropped, MessagesConverter, messages_of
from tessel.data.instruct.dialogue import ANSWERING, ASKING, SYSTEM, Dialogue, Example, Message
from tessel.data.instruct.encoder import InstructionEncoder, ids_and_labels
from tessel.data.instruct.rendering import Rendered, RenderOptions
from tessel.data.instruct.shorten import IGNORED
from tessel.data.instruct.vocabulary import hf_of
from tessel.data.tokenizer import Tokenizer
from tessel.errors import TesselError

HUNYUAN = "HunyuanInstructionHandler"
# Where an answer begins and where it ends; both are trained.
_BEGIN, _END = "<|extra_0|>", "<|eos|>"
_ROUND = ((SYSTEM,), ASKING, ANSWERING)


class RoundsConverter(MessagesConverter):
    """Rows of messages in rounds of three: the system, who asks, who answers. Only messages are read."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns read."""
        return (self.names.messages,)

    def __call__(self, values: Mapping[str, Any]) -> Example | Dropped:
        """The last message is the answer; text of the system stays where it is said."""
        messages = [self._message(message) for message in messages_of(values, self.names.messages)]
        problem = _order_problem(messages)
        if problem is None:
            return Example(tuple(messages[:-1]), tuple(messages[-1:]))
        if self.as_mindspeed:
            return Dropped(problem)
        raise TesselError(problem)

    def _message(self, raw: Mapping[str, Any]) -> Message:
        message, tags = super()._message(raw), self.names.tags
        is_system = tags.system_tag is not None and raw.get(tags.role_tag) == tags.system_tag
        return message._replace(role=SYSTEM) if is_system else message


def _order_problem(messages: Sequence[Message]) -> str | None:
    """Why these messages are no rounds; None if they are."""
    for i, message in enumerate(messages):
        if message.role not in _ROUND[i % 3]:
            role = message.role.removeprefix("?")
            return f"message {i + 1} is of {role!r}; the system, a question and an answer must take turns"
    if not messages or len(messages) % 3:
        return f"there are {len(messages)} messages: rounds of the system, a question and an answer are three each"
    return None


class HunyuanRenderer(ChatRenderer):
    """A `Renderer` by the chat template; trained is what stands between two marks, with these."""

    def __init__(self, tokenizer: Tokenizer, options: RenderOptions) -> None:
        super().__init__(tokenizer, options)
        hf = hf_of(tokenizer)
        ids = hf.get_vocab()
        missing = [mark for mark in (_BEGIN, _END) if mark not in ids]
        pad = getattr(hf, "pad_id", None)
        self.pad = hf.pad_token_id if pad is None else pad
        if self.pad is None:
            missing.append("padding")
        if missing:
            raise TesselError(
                f"The tokenizer {tokenizer.source} has no {' and no '.join(missing)}, which {HUNYUAN} needs: it is for "
                "the tokenizer of Hunyuan-Large. Take SharegptStyleInstructionHandler for another."
            )
        self._begin, self._end = ids[_BEGIN], ids[_END]

    def dialogues(self, dialogues: Sequence[Dialogue]) -> list[Rendered]:
        """See `Renderer`. The n-th beginning mark and the n-th end are a pair, as in MindSpeed-LLM."""
        texts = [self._apply([_said(message) for message in one.messages], "", asks=False) for one in dialogues]
        return [self._trained_between(np.array(ids, np.int32)) for ids in self.vocabulary.encoder(texts)]

    def _trained_between(self, ids: np.ndarray) -> Rendered:
        labels = np.full_like(ids, IGNORED)
        begins, ends = (np.flatnonzero(ids == mark).tolist() for mark in (self._begin, self._end))
        for begin, end in zip(begins, ends, strict=False):
            labels[begin : end + 1] = ids[begin : end + 1]
        most = self.options.max_tokens
        return Rendered(ids[:most], labels[:most])


class HunyuanEncoder(InstructionEncoder):
    """Samples whose attention mask leaves padding out."""

    def __init__(self, converter: RoundsConverter, renderer: HunyuanRenderer) -> None:
        super().__init__(converter, renderer)
        self._pad = renderer.pad

    def _arrays(self, rendered: Sequence[Rendered]) -> tuple[Encoded, ...]:
        ids, labels = ids_and_labels(rendered)
        return ids, ids._replace(tokens=(ids.tokens != self._pad).astype(np.int32)), labels


def _said(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}
