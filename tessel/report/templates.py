"""`tessel templates`: the prompt types there are, what they say, and whether a tokenizer's chat template agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tessel.errors import TesselError, UsageError
from tessel.runtime.log import log

if TYPE_CHECKING:
    from tessel.config.templates import TemplatesConfig
    from tessel.data.instruct.check import Comparison
    from tessel.data.instruct.rendering import Renderer
    from tessel.data.instruct.templates import Template

_ORIGINS = {
    "output": "compared with MindSpeed-LLM's output",
    "rule": "by MindSpeed-LLM's documented rule",
    "factory": "as in LLaMA-Factory; not compared",
}


def templates(cfg: TemplatesConfig) -> bool:
    """Do what `cfg` asks for; False where a checked prompt type differs from the chat template.

    Raises:
        UsageError: no such prompt type.
        TesselError: a file or the tokenizer cannot be used.
    """
    if cfg.check is not None:
        return _check(cfg)
    if cfg.show is not None or cfg.prompt_type_path is not None:
        _show(cfg)
    else:
        _list()
    return True


def _list() -> None:
    from tessel.data.instruct.templates import HF, known_templates

    known = known_templates()
    width = max(map(len, known))
    log(f"{HF:<{width}}  the tokenizer's own chat template")
    for name, template in known.items():
        log(f"{name:<{width}}  {_ORIGINS[template.origin]}")


def _show(cfg: TemplatesConfig) -> None:
    """The template as YAML, which can be changed and given to --prompt-type-path."""
    from tessel.data.instruct.templates import HF, find_template

    if cfg.show == HF:
        raise UsageError("--show hf: the chat template is in the tokenizer; compare it with --check DIR.")
    log(as_yaml(find_template(cfg.show, cfg.prompt_type_path)))


def as_yaml(template: Template) -> str:
    """The fields of a template that are not what a template has by itself."""
    import dataclasses

    import yaml

    from tessel.data.instruct.templates import ROLES, Template

    plain = Template(template.name)
    entry: dict[str, Any] = {"name": template.name}
    for field in dataclasses.fields(template):
        value = getattr(template, field.name)
        if field.name not in ("name", "origin") and value != getattr(plain, field.name):
            entry[field.name] = [_slot(v) for v in value] if field.name in ROLES else _plain(value)
    return str(yaml.dump(entry, Dumper=_dumper(), allow_unicode=True, sort_keys=False, width=1000)).rstrip()


def _dumper() -> Any:
    """A dumper that spells ends of lines out."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "\n" in value else None)

    Dumper.add_representer(str, text)
    return Dumper


def _slot(slot: Any) -> Any:
    return slot if isinstance(slot, str) else {type(slot).__name__.lower(): slot.name}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check(cfg: TemplatesConfig) -> bool:
    from tessel.config.tokenizer import Tokenizer
    from tessel.data.instruct.chat import ChatRenderer
    from tessel.data.instruct.render import renderer_for
    from tessel.data.instruct.rendering import RenderOptions
    from tessel.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Tokenizer(tokenizer_name_or_path=cfg.check))
    options = RenderOptions(thinking={"true": True, "false": False}.get(cfg.enable_thinking))
    chat = ChatRenderer(tokenizer, options)
    if cfg.prompt_type is None and cfg.prompt_type_path is None:
        _check_all(tokenizer, chat, options)
        return True
    renderer = renderer_for(tokenizer, cfg.prompt_type, cfg.prompt_type_path, options)
    return _check_one(tokenizer, renderer, chat)


def _check_one(tokenizer: Any, renderer: Renderer, chat: Any) -> bool:
    from tessel.data.instruct.check import DIFFERS, END, NONE, SAME, compare, difference
    from tessel.data.instruct.pieces import Pieces

    ours, theirs = Pieces(tokenizer, renderer.vocabulary.added), Pieces(tokenizer, {})
    comparisons = compare(renderer, chat)
    for one in comparisons:
        if one.status == SAME:
            log(f"{one.name}: the same {len(one.ours)} tokens")
        elif one.status == NONE:
            log(f"{one.name}: not compared: {one.reason}")
        elif one.status == END:
            log(f"{one.name}: the same up to the end of the {_shorter(one)}; what follows the last answer differs:")
        else:
            log(f"{one.name}: differs from token {one.first} on:")
        if one.status in (END, DIFFERS):
            log("\n".join(difference(one, ours, theirs)))
    num_differ = sum(one.status == DIFFERS for one in comparisons)
    if num_differ:
        log(f"{num_differ} of {len(comparisons)} dialogues differ: a model that is trained so is served otherwise.")
    return not num_differ


def _shorter(one: Comparison) -> str:
    return "prompt type's text" if len(one.ours) < len(one.theirs) else "chat template's text"


def _check_all(tokenizer: Any, chat: Any, options: Any) -> None:
    """A line a prompt type, the nearest to the chat template first."""
    from tessel.data.instruct.check import DIALOGUES, END, SAME, compare
    from tessel.data.instruct.render import renderer_for
    from tessel.data.instruct.templates import known_templates

    rows: list[tuple[int, str, list[str]]] = []
    for name in known_templates():
        try:
            statuses = [one.status for one in compare(renderer_for(tokenizer, name, None, options), chat)]
        except TesselError as error:
            log(f"{name}: not for this tokenizer: {error}")
            continue
        rows.append((sum(status in (SAME, END) for status in statuses), name, statuses))
    rows.sort(key=lambda row: -row[0])
    width = max(len(row[1]) for row in rows)
    log(f"{'':<{width}}  " + "  ".join(f"{name:<8}" for name in DIALOGUES))
    for _, name, statuses in rows:
        log(f"{name:<{width}}  " + "  ".join(f"{status:<8}" for status in statuses).rstrip())
    log(f"{END}: the same but for what follows the last answer. First differences: --prompt-type NAME")
