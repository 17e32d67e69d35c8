"""Handlers: how rows are read and what is written, by MindSpeed-LLM's names or a class of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tessel.config.nearest import nearest
from tessel.config.preprocess_rules import PRETRAIN_HANDLERS, REGISTRY_HANDLER
from tessel.data.encoding import RowEncoder
from tessel.data.instruct.converters import AlpacaConverter, Converter, MessagesConverter
from tessel.data.instruct.detect import with_handler
from tessel.data.instruct.encoder import ENCODERS, MINDSPEED_ENCODERS, InstructionEncoder
from tessel.data.instruct.hunyuan import HUNYUAN, HunyuanEncoder, HunyuanRenderer, RoundsConverter
from tessel.data.instruct.mapping import OPENAI_TAGS, MessageColumns, alpaca_columns, message_columns
from tessel.data.instruct.plain import MOSS_TURNS, PLAIN_PROMPTS, MossTurnsEncoder, PlainPromptEncoder
from tessel.data.instruct.render import SlotRenderer, renderer_for
from tessel.data.instruct.rendering import NO_LIMIT, NO_PAIR_LIMIT, RenderOptions
from tessel.data.instruct.vocabulary import plain_vocabulary
from tessel.data.tokenizer import Tokenizer
from tessel.errors import UsageError

if TYPE_CHECKING:
    from tessel.config.preprocess import PreprocessConfig


@dataclass(frozen=True)
class _Kind:
    """What a handler is: the format of its rows, and what it writes: a sample, a preference or a prompt."""

    rows: str
    writes: str = "samples"
    is_proved: bool = False


_TEMPLATED = {
    "AlpacaStyleInstructionHandler": _Kind("alpaca", is_proved=True),
    "SharegptStyleInstructionHandler": _Kind("sharegpt", is_proved=True),
    "OpenAIInstructionHandler": _Kind("openai"),
    "AlpacaStylePairwiseHandler": _Kind("alpaca", "preferences", is_proved=True),
    "SharegptStylePairwiseHandler": _Kind("sharegpt", "preferences"),
    "PPOAlpacaStyleInstructionHandler": _Kind("alpaca", "questions"),
    "R1AlpacaStyleInstructionHandler": _Kind("alpaca", "prompts"),
    "R1SharegptStyleInstructionHandler": _Kind("sharegpt", "prompts"),
}
HANDLERS = (*PRETRAIN_HANDLERS, *PLAIN_PROMPTS, MOSS_TURNS, HUNYUAN, REGISTRY_HANDLER, *_TEMPLATED)
"""Names that are known."""


def instruction_encoder(cfg: PreprocessConfig, tokenizer: Tokenizer) -> RowEncoder:
    """The encoder of --handler-name, with --prompt-type and what else shapes samples.

    Where none is named, the first row of the input decides.

    Raises:
        UsageError: no such handler (names the nearest), or flags that do not go together.
        TesselError: a template or a class of the user's is not what it should be.
    """
    cfg = with_handler(cfg)
    name = cfg.handler_name or ""
    if name in PLAIN_PROMPTS or name == MOSS_TURNS:
        _refuse_template(cfg, name)
        vocabulary = plain_vocabulary(tokenizer)
        if name == MOSS_TURNS:
            return MossTurnsEncoder(tokenizer.batch_encoder(), vocabulary)
        return PlainPromptEncoder(PLAIN_PROMPTS[name], tokenizer.batch_encoder(), cfg.append_eod, vocabulary)
    if name == HUNYUAN:
        return _hunyuan(cfg, tokenizer)
    if ".py:" in name:
        from tessel.data.instruct.own import OwnConverter, OwnEncoder, own_handler

        own = own_handler(name)
        if isinstance(own, OwnConverter):
            return _templated(cfg, tokenizer, own, "samples")
        return OwnEncoder(own, tokenizer, cfg.append_eod)
    kind = _kind(name)
    return _templated(cfg, tokenizer, converter_of(kind.rows, cfg, pairwise=kind.writes == "preferences"), kind.writes)


def converter_of(rows: str, cfg: PreprocessConfig, pairwise: bool = False) -> Converter:
    """The converter of a format of rows: alpaca, sharegpt or openai, with --map-keys.

    Raises:
        UsageError: --map-keys is not for this format.
    """
    as_mindspeed = cfg.compatible == "mindspeed"
    if rows == "alpaca":
        return AlpacaConverter(alpaca_columns(cfg.map_keys), pairwise, as_mindspeed)
    if rows == "openai":
        default = MessageColumns("messages", OPENAI_TAGS, tools="tools")
        # MindSpeed-LLM's other prompt types write what is said alone.
        has_calls = not as_mindspeed or cfg.prompt_type == "deepseek4"
        return MessagesConverter(message_columns(cfg.map_keys, default), pairwise, as_mindspeed, True, has_calls)
    return MessagesConverter(message_columns(cfg.map_keys, MessageColumns()), pairwise, as_mindspeed)


def _hunyuan(cfg: PreprocessConfig, tokenizer: Tokenizer) -> RowEncoder:
    if cfg.prompt_type not in (None, "hf", "hunyuan") or cfg.append_eod or cfg.train_on_prompt or cfg.mask_history:
        raise UsageError(
            f"--handler-name {HUNYUAN} writes what the tokenizer's chat template does, and trains its answers with "
            "their end: leave --prompt-type (but for hunyuan), --append-eod, --train-on-prompt and --mask-history out."
        )
    as_mindspeed = cfg.compatible == "mindspeed"
    converter = RoundsConverter(message_columns(cfg.map_keys, MessageColumns()), as_mindspeed=as_mindspeed)
    options = RenderOptions(max_tokens=cfg.seq_length if as_mindspeed else None)
    return HunyuanEncoder(converter, HunyuanRenderer(tokenizer, options))


def _kind(name: str) -> _Kind:
    if name in _TEMPLATED:
        return _TEMPLATED[name]
    if name == REGISTRY_HANDLER:
        raise UsageError(
            f"--handler-name {name} reads data sets by their names in a registry, which only `tessel preprocess` does: "
            "run that first, and give its --output-prefix as the data."
        )
    close = nearest(name, HANDLERS, similarity=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Known are {', '.join(HANDLERS)}."
    raise UsageError(
        f"--handler-name {name} is not known (MindSpeed-LLM would take GeneralPretrainHandler without a word). {hint}"
    )


def _templated(cfg: PreprocessConfig, tokenizer: Tokenizer, converter: Converter, writes: str) -> RowEncoder:
    if cfg.pack and writes != "samples":
        raise UsageError(f"--pack joins dialogues; --handler-name {cfg.handler_name} writes {writes}. Leave it out.")
    as_mindspeed = cfg.compatible == "mindspeed"
    options, additional = render_options(cfg), cfg.dataset_additional_keys
    if as_mindspeed and writes == "preferences":
        options = replace(options, max_tokens=NO_PAIR_LIMIT, append_eod=False)
    if as_mindspeed and writes != "prompts":
        additional = ()
    renderer = renderer_for(tokenizer, cfg.prompt_type, cfg.prompt_type_path, options, as_mindspeed)
    by_slots = as_mindspeed and isinstance(renderer, SlotRenderer)
    encoder: Callable[..., InstructionEncoder] = (MINDSPEED_ENCODERS if by_slots else ENCODERS)[writes]
    return encoder(converter, renderer, additional, as_mindspeed)


def render_options(cfg: PreprocessConfig) -> RenderOptions:
    """What the command line says about rendering.

    Raises:
        UsageError: flags that do not go together.
    """
    if cfg.train_on_prompt and cfg.mask_history:
        raise UsageError("--train-on-prompt and --mask-history ask for opposites; give one.")
    if cfg.reasoning_effort is not None and cfg.prompt_type not in ("hf", "deepseek4"):
        raise UsageError(
            f"--reasoning-effort {cfg.reasoning_effort}: only chat templates (--prompt-type hf) and deepseek4 know "
            "efforts."
        )
    thinks = cfg.enable_thinking == "true"
    if cfg.reasoning_effort == "max" and cfg.prompt_type == "deepseek4" and not thinks:
        raise UsageError("--reasoning-effort max asks for thoughts: add --enable-thinking true, or leave it out.")
    as_mindspeed = cfg.compatible == "mindspeed"
    return RenderOptions(
        max_tokens=_most_tokens(cfg),
        max_turn_tokens=cfg.seq_length - 1 if as_mindspeed and cfg.neat_pack and cfg.seq_length else None,
        append_eod=cfg.append_eod,
        train_on_prompt=cfg.train_on_prompt,
        mask_history=cfg.mask_history,
        drop_thinking=_drops_thinking(cfg),
        thinking={"true": True, "false": False}.get(cfg.enable_thinking),
        exact_thoughts=as_mindspeed,
        effort=cfg.reasoning_effort,
    )


def _drops_thinking(cfg: PreprocessConfig) -> bool:
    """Off where nothing is said, but for deepseek4, the one prompt type for which MindSpeed-LLM reads the flag.

    And that, for samples, only beside --reasoning-effort.
    """
    if cfg.prompt_type == "deepseek4":
        is_read = cfg.compatible != "mindspeed" or (
            cfg.reasoning_effort is not None and "Pairwise" not in (cfg.handler_name or "")
        )
        return cfg.drop_thinking != "false" or not is_read
    return cfg.drop_thinking == "true" and cfg.compatible != "mindspeed"


def _most_tokens(cfg: PreprocessConfig) -> int | None:
    """Where turns are cut. MindSpeed-LLM cuts, and then leaves out what was; tessel leaves it out, or packing cuts."""
    if cfg.compatible != "mindspeed":
        return None
    return cfg.seq_length if cfg.seq_length is not None else NO_LIMIT


def _refuse_template(cfg: PreprocessConfig, name: str) -> None:
    if cfg.prompt_type is not None or cfg.prompt_type_path is not None:
        raise UsageError(
            f"--handler-name {name} writes dialogues in a way of its own; leave --prompt-type out, or take "
            "AlpacaStyleInstructionHandler."
        )
