"""Dialogues to ids: the template of a model, for chat and for serving."""

from __future__ import annotations

from dataclasses import dataclass, field

from tessel.config.chat import Templating
from tessel.data.instruct.chat import ChatRenderer
from tessel.data.instruct.dialogue import Dialogue
from tessel.data.instruct.render import render_prompt, renderer_for
from tessel.data.instruct.rendering import Renderer, RenderOptions
from tessel.data.instruct.templates import HF
from tessel.data.instruct.tools import parse_tools
from tessel.data.instruct.vocabulary import hf_of
from tessel.data.tokenizer import Tokenizer
from tessel.errors import TesselError
from tessel.generate.prompts import template_stop_ids

THOUGHT_TAGS = ("<think>", "</think>")
# More tokens than a template writes between the last message and the answer.
_LAST_TOKENS = 16


@dataclass(frozen=True)
class ChatTemplate:
    """How dialogues are written for a model; `source` says where that is known from."""

    tokenizer: Tokenizer
    templating: Templating
    source: str
    _renderers: dict[tuple[bool | None, str | None], Renderer] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Tokenizer, templating: Templating) -> ChatTemplate:
        """The template that is asked for, else the tokenizer's own.

        Raises:
            TesselError: the tokenizer has none and no other is named, or the named one cannot be used.
        """
        name, path = templating.prompt_type, templating.prompt_type_path
        if name in (None, HF) and path is None:
            if not hf_of(tokenizer).chat_template:
                raise TesselError(
                    f"The tokenizer {tokenizer.source} has no chat template, so that nothing says how dialogues are "
                    "written for this model: give --prompt-type NAME, the one it was trained with (`tessel templates` "
                    "lists them), or put its chat_template.jinja into the folder."
                )
            source = f"the chat template of the tokenizer {tokenizer.source}"
        elif path is not None:
            source = f"--prompt-type-path {path}"
        else:
            source = f"--prompt-type {name}"
        template = cls(tokenizer, templating, source)
        template.renderer()  # what is wrong with it is said at once
        return template

    def renderer(self, thinking: bool | None = None, effort: str | None = None) -> Renderer:
        """The renderer with what is said about thoughts here, else by --enable-thinking."""
        key = (self.templating.thinking if thinking is None else thinking, effort)
        if key not in self._renderers:
            options = RenderOptions(thinking=key[0], effort=effort)
            name = self.templating.prompt_type
            if name is None and self.templating.prompt_type_path is None:
                name = HF
            self._renderers[key] = renderer_for(self.tokenizer, name, self.templating.prompt_type_path, options)
        return self._renderers[key]

    def prompt(self, dialogue: Dialogue, thinking: bool | None = None, effort: str | None = None) -> tuple[int, ...]:
        """Ids up to where the assistant answers; `dialogue` ends with a question.

        Raises:
            TesselError: the template cannot write the dialogue, or leaves its tools out.
        """
        renderer = self.renderer(thinking, effort)
        if dialogue.tools and isinstance(renderer, ChatRenderer):
            text = renderer.text(dialogue, asks=True)
            lacking = [tool["name"] for tool in parse_tools(dialogue.tools) if tool["name"] not in text]
            if lacking:
                raise TesselError(f"the model is not told of tools: {self.source} leaves out {', '.join(lacking)}")
        return tuple(render_prompt(dialogue, renderer))

    def stop_ids(self) -> frozenset[int]:
        """What ends an answer, beside the model's own."""
        return template_stop_ids(self.renderer(), self.tokenizer)

    def begins_in_thought(self, prompt_ids: tuple[int, ...]) -> bool:
        """Whether the prompt ends within a thought, which the answer goes on with."""
        end = self.tokenizer.decode(prompt_ids[-_LAST_TOKENS:])
        return end.rstrip().endswith(THOUGHT_TAGS[0])
