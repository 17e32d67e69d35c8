"""What becomes of every flag of the suites whose scripts run here.

`suites/*.txt` name the flags of a suite, under the verb that takes over from its program. What a
verb does with a flag is not written there: it is asked of the verb's own fields, of the flags that
`tessel.config` accepts or refuses by name, and of the rewrites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

from tessel.config.chat import ChatConfig
from tessel.config.convert import CONVERSION, ConvertConfig
from tessel.config.evaluate import EvaluateConfig
from tessel.config.generate_flags import GENERATION
from tessel.config.megatron import MEGATRON, ForeignFlags
from tessel.config.parser import parse
from tessel.config.preprocess import PreprocessConfig
from tessel.config.preprocess_flags import PREPROCESSING
from tessel.config.run import RunConfig
from tessel.config.schema import Option, normal_flag, options
from tessel.config.validate import validate
from tessel.config.verbs import GenerateConfig
from tessel.drop_in.rewrites import REWRITES
from tessel.errors import UsageError

SUITES = ("mindspeed", "modellink", "pai", "megatron")
_ACCEPTED_HELP = "accepted: "
OF_TRAINING = "it is of training, and the model's shape is read from config.json"
_USES_A_MODEL = ("convert", "generate", "chat", "evaluate")

_READERS: dict[str, tuple[type, ForeignFlags]] = {
    "pretrain": (RunConfig, MEGATRON),
    "preprocess": (PreprocessConfig, PREPROCESSING),
    "convert": (ConvertConfig, CONVERSION),
    "generate": (GenerateConfig, GENERATION),
    "chat": (ChatConfig, GENERATION),
    "evaluate": (EvaluateConfig, GENERATION),
}


class Kind(StrEnum):
    """What becomes of a flag."""

    SUPPORTED = "supported"
    ALIAS = "alias"
    MEANINGLESS = "meaningless"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Row:
    """A flag of a suite, and what becomes of it."""

    verb: str
    flag: str
    kind: Kind
    text: str
    """Supported: what it does. Alias: what stands in its place. Meaningless: why. Refused: the remedy."""


def judge(verb: str, flag: str, values: Sequence[str] = ()) -> Row:
    """What becomes of `flag`, as another suite spells it, with `values` where they matter."""
    name = normal_flag(flag)
    rewrite = REWRITES.get(verb, {}).get(name)
    if rewrite is not None:
        kind = Kind.MEANINGLESS if rewrite.is_dropped and not rewrite.result(values) else Kind.ALIAS
        return Row(verb, name, kind, rewrite.meaning)
    option = fields(verb).get(name)
    if option is not None:
        return _of_field(verb, name, option)
    foreign = _READERS[verb][1]
    if verb in _USES_A_MODEL and name not in foreign.names() and _acts_in_training(name):
        return Row(verb, name, Kind.MEANINGLESS, OF_TRAINING)
    refusal = foreign.refusal(name, values)
    if refusal is None and name in foreign.accepted:
        only = foreign.accepted[name].only
        reason = foreign.accepted[name].reason
        return Row(verb, name, Kind.MEANINGLESS, f"{reason}; only {' or '.join(only)}" if only else reason)
    refusal = refusal or foreign.family_refusal(name)
    if refusal is not None:
        return Row(verb, name, Kind.REFUSED, _short(name, refusal))
    in_training = judge("pretrain", name) if verb in _USES_A_MODEL else Row(verb, name, Kind.UNKNOWN, "")
    return Row(verb, name, in_training.kind, in_training.text)


def _acts_in_training(name: str) -> bool:
    """Whether scripts that use a model may repeat this flag of the run that trained it."""
    return judge("pretrain", name).kind in (Kind.SUPPORTED, Kind.ALIAS, Kind.MEANINGLESS)


def _short(name: str, refusal: str) -> str:
    """A refusal without what the table says anyway."""
    text = refusal.removeprefix(f"{name} ").removeprefix("is ").removesuffix(".")
    return text.removeprefix("not a flag of tessel: ").removesuffix("; leave it out")


def _of_field(verb: str, name: str, option: Option) -> Row:
    text = str(option.metadata["help"])
    if text.startswith(_ACCEPTED_HELP):
        return Row(verb, name, Kind.MEANINGLESS, text.removeprefix(_ACCEPTED_HELP))
    if name != option.flag:
        return Row(verb, name, Kind.ALIAS, option.flag)
    return Row(verb, name, Kind.SUPPORTED, text)


@cache
def fields(verb: str) -> Mapping[str, Option]:
    """Every spelling of a verb's flags -> the field that it sets."""
    return {spelling: o for o in options(_READERS[verb][0]) for spelling in o.spellings}


def refusal(verb: str, argv: Sequence[str]) -> str | None:
    """Why a verb would not take a command line; None if it would."""
    cls, foreign = _READERS[verb]
    try:
        cfg = parse(cls, argv, f"tessel {verb}", foreign).value
        if isinstance(cfg, RunConfig):
            validate(cfg)
    except UsageError as error:
        return str(error)
    return None


@cache
def rows(suite: str) -> tuple[Row, ...]:
    """The flags of a suite, by the verbs that take them.

    Raises:
        UsageError: no such suite.
    """
    if suite not in SUITES:
        raise UsageError(f"unknown suite {suite}: it must be one of {', '.join(SUITES)}.")
    return tuple(judge(verb, flag) for verb, flag in _listed(suite))


def _listed(suite: str) -> Iterator[tuple[str, str]]:
    """(verb, flag) of each line of a suite's list."""
    verb = ""
    for line in (Path(__file__).parent / "suites" / f"{suite}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            verb = line.strip("[]")
        elif line:
            yield verb, line
