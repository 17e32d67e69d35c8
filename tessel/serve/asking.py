"""From the body of a request to what the batcher is asked for."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tessel.data.instruct.dialogue import ASSISTANT, FUNCTION, OBSERVATION, USER, Dialogue, Message
from tessel.errors import TesselError
from tessel.generate.batcher import Batcher
from tessel.generate.dialogues import ChatTemplate
from tessel.generate.load import Opened
from tessel.generate.request import Request
from tessel.generate.sampling import Sampling
from tessel.serve.errors import ApiError
from tessel.serve.grammars import Grammars
from tessel.serve.protocol import Asked, ChatBody, ChatMessage, CompletionBody, Function, NamedTool

_COMPLETION_TOKENS = 16
"""New tokens of /v1/completions where the client does not say, as OpenAI has it."""
_MAX_SEED = 1 << 62


@dataclass(frozen=True)
class Asker:
    """Makes requests for one model.

    `template` is None for a model of plain text, and `no_template` then says why. `max_new_tokens`: what a client may
    ask for; `cache_tokens`: room for all texts together.
    """

    opened: Opened
    batcher: Batcher
    template: ChatTemplate | None
    no_template: str
    max_new_tokens: int
    cache_tokens: int
    grammars: Grammars

    def chat(self, body: ChatBody) -> list[Request]:
        """A request for each of `n` answers.

        Raises:
            ApiError: the dialogue cannot be written, or is too long.
        """
        if self.template is None:
            raise ApiError(400, f"This model has no chat: {self.no_template}", "messages")
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", "top_logprobs", "invalid_value")
        thinking = None if body.chat_template_kwargs is None else body.chat_template_kwargs.enable_thinking
        try:
            ids = self.template.prompt(dialogue_of(body), thinking, body.reasoning_effort)
        except TesselError as error:
            raise ApiError(400, str(error), "messages") from error
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        stop_ids = self.opened.stop_ids | self.template.stop_ids()
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        requests = self._requests(body, [ids], asked, stop_ids, num_logprobs, "messages")
        grammar = self._grammar(body, self.template, ids)
        return requests if grammar is None else [replace(request, grammar=grammar) for request in requests]

    def _grammar(self, body: ChatBody, template: ChatTemplate, prompt_ids: tuple[int, ...]) -> str | None:
        """What the answer is held to."""
        asked, functions = body.response_format, functions_to_call(body)
        has_format = asked is not None and asked.type != "text"
        if not functions and not has_format:
            return None
        param = "tool_choice" if functions else "response_format"
        if functions and has_format:
            raise ApiError(400, "A call that must be made has no response_format; leave one of the two out.", param)
        if template.begins_in_thought(prompt_ids):
            raise ApiError(
                400, "The answer begins with a thought; set chat_template_kwargs.enable_thinking to false.", param
            )
        if functions:
            return self.grammars.of_call(functions, template, param)
        schema = asked.json_schema.content if asked is not None and asked.json_schema is not None else None
        return self.grammars.of_json(schema, param)

    def complete(self, body: CompletionBody) -> list[Request]:
        """`n` requests for each prompt, those of the first prompt first.

        Raises:
            ApiError: a prompt cannot be taken.
        """
        if body.best_of not in (None, body.n or 1):
            raise ApiError(400, "This server has no best_of beside n; leave it out.", "best_of")
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "This server has no logprobs of an echoed prompt; leave one of the two out.", "echo")
        prompts = [self._ids(prompt) for prompt in prompts_of(body)]
        asked = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return self._requests(body, prompts, asked, self.opened.stop_ids, body.logprobs, "prompt")

    def _ids(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        try:
            return tuple(self.opened.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        except TesselError as error:
            raise ApiError(400, str(error), "prompt") from error

    def _requests(
        self,
        body: Asked,
        prompts: Sequence[tuple[int, ...]],
        asked: int | None,
        stop_ids: frozenset[int],
        num_logprobs: int | None,
        param: str,
    ) -> list[Request]:
        if asked is not None and asked > self.max_new_tokens:
            raise ApiError(
                400, f"max_tokens is {asked}, and this server gives at most {self.max_new_tokens}.", "max_tokens"
            )
        seed = secrets.randbelow(_MAX_SEED) if body.seed is None else body.seed % _MAX_SEED
        requests: list[Request] = []
        for ids in prompts:
            most = min(self.max_new_tokens, max(self.cache_tokens - len(ids), 1)) if asked is None else asked
            for _ in range(body.n or 1):
                requests.append(
                    Request(
                        ids,
                        sampling_of(body),
                        most,
                        (frozenset() if body.ignore_eos else stop_ids) | frozenset(body.stop_token_ids or ()),
                        body.stops,
                        seed + len(requests),
                        num_logprobs,
                    )
                )
            self._check(requests[-1], param)
        return requests

    def _check(self, request: Request, param: str) -> None:
        context = self.opened.config.max_position_embeddings
        if len(request.prompt_ids) > context:
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens, and the prompt has "
                f"{len(request.prompt_ids)}. Shorten it.",
                param,
                "context_length_exceeded",
            )
        try:
            self.batcher.check(request)
        except TesselError as error:
            raise ApiError(400, str(error), param) from error


def sampling_of(body: Asked) -> Sampling:
    """How tokens are chosen; a temperature or a top_p of 0 is the likeliest token."""
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    greedy = temperature == 0 or top_p == 0
    return Sampling(
        greedy,
        temperature or 1.0,
        max(body.top_k or 0, 0),  # -1 is "all" to other servers
        top_p or 1.0,
        body.min_p or 0.0,
        body.repetition_penalty or 1.0,
    )


def prompts_of(body: CompletionBody) -> list[str | Sequence[int]]:
    """The prompts of a completion, each a text or ids."""
    prompt = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]  # type: ignore[list-item]
    if not prompt:
        raise ApiError(400, "prompt is empty: give a text.", "prompt", "invalid_value")
    return list(prompt)  # type: ignore[arg-type]


def dialogue_of(body: ChatBody) -> Dialogue:
    """The messages as templates take them.

    Raises:
        ApiError: the last one is no question, or a call's arguments are no JSON.
    """
    messages = body.messages
    system = ""
    if messages[0].role in ("system", "developer"):
        system, messages = messages[0].text, messages[1:]
    if not messages or messages[-1].role not in ("user", "tool"):
        raise ApiError(400, "The last message must be of the user or of a tool.", "messages", "invalid_value")
    tools = [] if body.tool_choice == "none" else body.tools or []
    functions = [tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools]
    written = tuple(_message(message, number) for number, message in enumerate(messages))
    return Dialogue(written, system, json.dumps(functions, ensure_ascii=False) if functions else "")


def functions_to_call(body: ChatBody) -> list[Function]:
    """Those of which one must be called; empty where none must.

    Raises:
        ApiError: there is no such function.
    """
    choice, functions = body.tool_choice, [tool.function for tool in body.tools or ()]
    if choice in (None, "none", "auto"):
        return []
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
    if not functions:
        name = f" {choice.function.name!r}" if isinstance(choice, NamedTool) else ""
        raise ApiError(400, f"tool_choice asks for a function{name} that is not in tools.", "tool_choice")
    return functions


def _message(message: ChatMessage, number: int) -> Message:
    if message.tool_calls:
        return Message(FUNCTION, _calls(message, number), said=message.text)
    roles = {"assistant": ASSISTANT, "tool": OBSERVATION, "user": USER}
    return Message(roles.get(message.role, "system"), message.text)


def _calls(message: ChatMessage, number: int) -> str:
    calls = []
    for call in message.tool_calls or ():
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except ValueError as error:
            raise ApiError(
                400, f"The arguments of {call.function.name} are not JSON ({error}).", f"messages[{number}].tool_calls"
            ) from error
        calls.append({"name": call.function.name, "arguments": arguments})
    return json.dumps(calls, ensure_ascii=False)
