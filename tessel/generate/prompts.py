"""From what a user wrote to the ids that a model continues."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tessel.config.verbs import Drawing
from tessel.data.instruct.dialogue import ANSWERING, ASSISTANT, OBSERVATION, USER, Dialogue, Message
from tessel.data.instruct.render import SlotRenderer, render_prompt, renderer_for
from tessel.data.instruct.rendering import Renderer
from tessel.data.tokenizer import Tokenizer
from tessel.errors import TesselError, UsageError
from tessel.generate.beam import BeamOptions, EarlyStopping
from tessel.generate.sampling import Sampling
from tessel.model.config import ModelConfig

_ROLES = {"user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT, "tool": OBSERVATION}


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model gets it; `cut_tokens` of its beginning are gone."""

    ids: tuple[int, ...]
    cut_tokens: int = 0


@dataclass(frozen=True)
class Prompter:
    """Makes ids of prompts: by a template, if there is one, else as plain text.

    `room`: tokens that a prompt may have; longer ones are refused, or with `truncate` lose their beginning.
    """

    tokenizer: Tokenizer
    config: ModelConfig
    max_new_tokens: int
    truncate: bool = False
    renderer: Renderer | None = None
    system: str = ""

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        config: ModelConfig,
        max_new_tokens: int,
        truncate: bool = False,
        prompt_type: str | None = None,
        prompt_type_path: str | None = None,
        system: str | None = None,
    ) -> Prompter:
        """A prompter with the template of --prompt-type, if that is given."""
        has_template = prompt_type is not None or prompt_type_path is not None
        renderer = renderer_for(tokenizer, prompt_type, prompt_type_path) if has_template else None
        return cls(tokenizer, config, max_new_tokens, truncate, renderer, system or "")

    def __call__(self, prompt: Any, name: str) -> Prompt:
        """The ids of a text, or of messages; `name` says in errors where it stands.

        Raises:
            TesselError: it is empty, no prompt at all, or longer than the context.
        """
        ids = self.tokenizer.encode(prompt) if self.renderer is None and isinstance(prompt, str) else None
        if ids is None:
            ids = self._rendered(prompt, name)
        if not ids:
            raise TesselError(
                f"{name} {prompt!r} has no tokens, and there is nothing to continue. Give at least a word."
            )
        context = self.config.max_position_embeddings
        if self.truncate:
            room = max(context + 1 - self.max_new_tokens, 1)
            return Prompt(tuple(ids[-room:]), max(len(ids) - room, 0))
        if len(ids) > context:
            raise TesselError(
                f"{name} {str(prompt)[:30]!r}... has {len(ids)} tokens, more than the model's context of {context} "
                "(max_position_embeddings). Shorten it, or keep its end with --truncate-prompts."
            )
        return Prompt(tuple(ids))

    def stop_ids(self) -> frozenset[int]:
        """What ends an answer in the template, beside the model's own."""
        return frozenset() if self.renderer is None else template_stop_ids(self.renderer, self.tokenizer)

    def _rendered(self, prompt: Any, name: str) -> list[int]:
        if self.renderer is None:
            raise TesselError(f"{name} holds messages, which are written in a template: give --prompt-type NAME.")
        messages = [Message(USER, prompt)] if isinstance(prompt, str) else _messages(prompt, name)
        system = self.system
        if messages and messages[0].role == "system":
            system, messages = messages[0].content, messages[1:]
        roles = [message.role in ANSWERING for message in messages]
        if not roles or roles != [bool(i % 2) for i in range(len(roles))] or roles[-1]:
            raise TesselError(
                f"{name}: user and assistant must take turns, the user first and last; the roles are "
                f"{', '.join(message.role for message in messages) or 'none'}."
            )
        return render_prompt(Dialogue(tuple(messages), system), self.renderer)


def _messages(prompt: Any, name: str) -> list[Message]:
    messages = []
    for message in prompt if isinstance(prompt, list) else [None]:
        role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
        content = message.get("content", message.get("value")) if isinstance(message, Mapping) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise TesselError(f"{name} is neither a text nor a list of messages with a role and a content, both texts.")
        messages.append(Message(_ROLES.get(role, role), content))
    return messages


def template_stop_ids(renderer: Renderer, tokenizer: Tokenizer) -> frozenset[int]:
    """What ends an answer in a template.

    Raises:
        UsageError: a stop word of the template is no single token.
    """
    eos = renderer.vocabulary.eos
    words = renderer.template.stop_words if isinstance(renderer, SlotRenderer) else ()
    ids = token_ids(words, tokenizer, "the template's stop word")
    return ids if eos is None else ids | {eos}


def token_ids(words: Iterable[str], tokenizer: Tokenizer, what: str) -> frozenset[int]:
    """The ids of tokens as the tokenizer writes them.

    Raises:
        UsageError: one is no single token.
    """
    found = set()
    encode = tokenizer.batch_encoder(add_special_tokens=False)
    for word in words:
        (ids,) = encode([word])
        if len(ids) != 1:
            raise UsageError(
                f"{what} {word!r} is {len(ids)} tokens in this tokenizer, not one: name one, or use --stop."
            )
        found.add(ids[0])
    return frozenset(found)


def stop_ids_of(cfg: Drawing, own: frozenset[int], tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: the model's `own`, unless they are ignored, and those that the flags name."""
    named = token_ids(cfg.add_eos_token, tokenizer, "--add-eos-token")
    return (frozenset() if cfg.ignore_eos else own) | named | frozenset(cfg.stop_token_ids)


def sampling_of(cfg: Drawing) -> Sampling:
    """How the flags choose tokens. Beams are not drawn unless that is asked for."""
    greedy = not cfg.draw_beams if cfg.num_beams > 1 else cfg.greedy
    return Sampling(greedy, cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty)


def beams_of(cfg: Drawing) -> BeamOptions | None:
    """How the flags search; None where they do not."""
    if cfg.num_beams == 1:
        return None
    early: dict[str, EarlyStopping] = {"true": True, "false": False, "never": "never"}
    return BeamOptions(cfg.num_beams, cfg.length_penalty, early[cfg.early_stopping])


def without_stop(tokens: Sequence[int], stop_ids: frozenset[int]) -> tuple[int, ...]:
    """A beam's tokens without the one that ended it."""
    return tuple(tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens)
