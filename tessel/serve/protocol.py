"""The bodies of requests: OpenAI's fields, and a few that servers of open models share.

A field that is not here is refused, as OpenAI does. The ones named under "no effect" are taken, since clients send
them without being asked to.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Stop = Annotated[list[str], Field(max_length=16)]


class Strict(BaseModel):
    """No unknown fields, and no texts for numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream brings beside text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # no effect


class Asked(Strict):
    """What both kinds of requests have."""

    model: str
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: str | Stop | None = None
    # Other servers' own.
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    # Known, and refused where they would change anything.
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # No effect.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("frequency_penalty", "presence_penalty", "logit_bias")
    @classmethod
    def _is_unused(cls, value: Any) -> Any:
        if value:
            raise ValueError("this server does not have it; use repetition_penalty, or leave it out")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return tuple(one for one in ([self.stop] if isinstance(self.stop, str) else self.stop) if one)


class Function(Strict):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # no effect: a call that must be made is held to the schema, others are not


class Tool(Strict):
    type: Literal["function"]
    function: Function


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Part(Strict):
    """A part of a message; there are texts alone."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message. Fields that an answer of a server may have had are taken back with it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """All that is said."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class JsonSchema(Strict):
    """The form of an answer; without a schema, any object."""

    name: str
    description: str | None = None  # no effect
    content: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # no effect: the answer is held to the schema in any case


class ResponseFormat(Strict):
    """What an answer is held to."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_what_it_says(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with type 'json_schema', and with no other")
        return self


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    """A function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class TemplateArguments(Strict):
    """What the chat template is told."""

    enable_thinking: bool | None = None


class ChatBody(Asked):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None  # no effect
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: TemplateArguments | None = None


class CompletionBody(Asked):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("suffix")
    @classmethod
    def _is_none(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("this server does not fill in middles; leave it out")
        return value
