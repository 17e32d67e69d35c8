"""From the batcher's events to the bodies of answers, whole or as a stream of server-sent events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from tessel.data.instruct.tools import Call
from tessel.generate.request import Event
from tessel.serve.toolcalls import ToolCalls

Decode = Callable[[Sequence[int]], str]
DONE = b"data: [DONE]\n\n"
_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def sse(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


class Reply:
    """What both kinds of answers have: `kind` begins their ids, `prompt_tokens` are those of all prompts."""

    kind = ""
    names = ("", "")
    """OpenAI's names of the object: whole, and of a piece."""

    def __init__(self, model: str, decode: Decode, num_choices: int, prompt_tokens: int) -> None:
        self._model, self._decode = model, decode
        self._id = f"{self.kind}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._prompt_tokens = prompt_tokens
        self._num_choices = num_choices
        # Of each chunk, all but what follows its head: made once, since there are many.
        self._opening = b"data: " + orjson.dumps(self._head(self.names[1]))[:-1] + b","
        self.new_tokens = 0

    def piece(self, number: int, events: Sequence[Event]) -> dict[str, Any] | None:
        """What some events, one after another, add to the choice `number` of a stream; None for nothing."""
        raise NotImplementedError

    def openings(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def whole(self, events: Sequence[tuple[int, Event]]) -> dict[str, Any]:
        """The answer that is not streamed."""
        raise NotImplementedError

    def chunk(self, choices: Sequence[dict[str, Any]], usage: bool = False) -> bytes:
        """A piece of a stream, as a server-sent event. With `usage`, the last one, without choices."""
        rest = {"choices": choices, "usage": self.usage()} if usage else {"choices": choices}
        return self._opening + orjson.dumps(rest)[1:] + b"\n\n"

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self._prompt_tokens + self.new_tokens,
        }

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self._id, "object": name, "created": self._created, "model": self._model}

    def _count(self, events: Sequence[Event]) -> None:
        self.new_tokens += sum(event.token is not None for event in events)


class ChatReply(Reply):
    """Of /v1/chat/completions. With `has_tools`, calls are taken out of the text."""

    kind = "chatcmpl"
    names = ("chat.completion", "chat.completion.chunk")

    def __init__(self, *arguments: Any, has_tools: bool = False) -> None:
        super().__init__(*arguments)
        self._tools = [ToolCalls() if has_tools else None for _ in range(self._num_choices)]

    def openings(self) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._choice(number, delta) for number in range(self._num_choices)]

    def piece(self, number: int, events: Sequence[Event]) -> dict[str, Any] | None:
        """See `Reply`."""
        self._count(events)
        text, calls = self._said(number, events)
        delta: dict[str, Any] = {"content": text} if text else {}
        tools = self._tools[number]
        if calls and tools is not None:
            first = tools.num_calls - len(calls)
            delta["tool_calls"] = [{"index": first + i} | _written(call) for i, call in enumerate(calls)]
        logprobs = self._logprobs(events)
        if not delta and logprobs is None and events[-1].finish is None:
            return None
        return self._choice(number, delta, logprobs, self._reason(number, events[-1]))

    def whole(self, events: Sequence[tuple[int, Event]]) -> dict[str, Any]:
        """See `Reply`."""
        choices = []
        for number in range(self._num_choices):
            own = [event for owner, event in events if owner == number]
            self._count(own)
            text, calls = self._said(number, own)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text or None, "tool_calls": [_written(call) for call in calls]}
            logprobs, reason = self._logprobs(own), self._reason(number, own[-1])
            choices.append({"index": number, "message": message, "logprobs": logprobs, "finish_reason": reason})
        return self._head(self.names[0]) | {"choices": choices, "usage": self.usage()}

    def _said(self, number: int, events: Sequence[Event]) -> tuple[str, tuple[Call, ...]]:
        text, tools = "".join(event.text for event in events), self._tools[number]
        if tools is None:
            return text, ()
        text, calls = tools.push(text)
        if events[-1].finish is not None:
            rest, last = tools.finish()
            text, calls = text + rest, calls + last
        return text, calls

    def _reason(self, number: int, event: Event) -> str | None:
        tools = self._tools[number]
        return "tool_calls" if event.finish == "stop" and tools is not None and tools.num_calls else event.finish

    @staticmethod
    def _choice(number: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        content = [self._logprob(event) for event in events if event.logprob is not None]
        return {"content": content, "refusal": None} if content else None

    def _logprob(self, event: Event) -> dict[str, Any]:
        assert event.token is not None
        top = [self._token(token, logprob) for token, logprob in event.top]
        return self._token(event.token, event.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._decode([token])
        # A part of a character has bytes, but the decoder does not say which.
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if _HALF_CHARACTER in text else list(text.encode()),
        }


class CompletionReply(Reply):
    """Of /v1/completions. `prompts`: what each choice begins with where the prompt is echoed, else ""."""

    kind = "cmpl"
    names = ("text_completion", "text_completion")

    def __init__(self, *arguments: Any, prompts: Sequence[str]) -> None:
        super().__init__(*arguments)
        self._prompts = prompts
        self._offsets = [0] * self._num_choices

    def openings(self) -> list[dict[str, Any]]:
        """The prompts that are echoed."""
        return [self._choice(number, prompt) for number, prompt in enumerate(self._prompts) if prompt]

    def piece(self, number: int, events: Sequence[Event]) -> dict[str, Any] | None:
        """See `Reply`."""
        self._count(events)
        text, logprobs, reason = (
            "".join(event.text for event in events),
            self._logprobs(number, events),
            events[-1].finish,
        )
        if not text and logprobs is None and reason is None:
            return None
        return self._choice(number, text, logprobs, reason)

    def whole(self, events: Sequence[tuple[int, Event]]) -> dict[str, Any]:
        """See `Reply`."""
        choices = []
        for number, prompt in enumerate(self._prompts):
            own = [event for owner, event in events if owner == number]
            self._count(own)
            text = prompt + "".join(event.text for event in own)
            choices.append(self._choice(number, text, self._logprobs(number, own), own[-1].finish))
        return self._head(self.names[0]) | {"choices": choices, "usage": self.usage()}

    @staticmethod
    def _choice(number: int, text: str, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, number: int, events: Sequence[Event]) -> dict[str, Any] | None:
        events = [event for event in events if event.token is not None and event.logprob is not None]
        if not events:
            return None
        tokens = [self._decode([event.token]) for event in events if event.token is not None]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": [{self._decode([token]): value for token, value in event.top} for event in events],
            "text_offset": offsets,
        }


def _written(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
