"""Recipes: each is resolved, built for every model that it names, and fits on the devices that it states."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessel.cli import main
from tessel.config.megatron import MEGATRON
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.config.tune import with_defaults
from tessel.config.validate import validate
from tessel.layout.search import USABLE_SHARE
from tessel.layout.sharding import parameters
from tessel.layout.tiles import tile_of
from tessel.layout.topology import Place
from tessel.model.catalog import CATALOG
from tests.recipes.recipes import GIB, Recipe, build, differences, needs, read_recipes

GOLDEN = Path(__file__).parent / "golden"
RECIPES = read_recipes()
CASES = [(recipe, model) for recipe in RECIPES for model in recipe.models]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_resolved_configuration_is_the_golden_one(recipe: Recipe) -> None:
    """What is not a default of `tessel pretrain`; UPDATE_GOLDEN=1 writes the files anew, where a change is meant."""
    path = GOLDEN / f"{recipe.name.replace('/', '-')}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(differences(recipe))
    assert differences(recipe) == path.read_text()


def test_every_golden_file_is_of_a_recipe() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {recipe.name.replace("/", "-") for recipe in RECIPES}


@pytest.mark.parametrize(("recipe", "model"), CASES, ids=lambda value: getattr(value, "name", value))
def test_models_are_built_and_fit(recipe: Recipe, model: str) -> None:
    built = build(recipe, model)
    rules = parameters(built.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in built.model.named_parameters()}
    assert shapes == {name: rule.shape for name, rule in rules.items()}
    held = sum(math.prod(tile_of(rule, built.topology, Place()).size) for rule in rules.values())
    assert (held < sum(map(math.prod, shapes.values()))) == (built.topology.ep > 1), "experts alone are dealt out"
    usable = USABLE_SHARE * recipe.memory_gib * GIB
    assert 0.05 * usable < needs(built) <= usable


def test_recipes_cover_what_is_known() -> None:
    """All sizes of Qwen2.5, Qwen3 and Llama that planning knows by name; the largest are left out."""
    left_out = {"Qwen3-Coder-480B-A35B", "Llama-3.1-405B", "Mixtral-8x7B"}
    for method in ("sft", "lora", "dpo"):
        models = [model for recipe in RECIPES if recipe.name.startswith(method) for model in recipe.models]
        assert sorted(models) == sorted(CATALOG.keys() - left_out)
    dense = [model for recipe in RECIPES if recipe.name.startswith("qlora") for model in recipe.models]
    assert sorted(dense) == sorted(name for name in CATALOG.keys() - left_out if not re.search(r"-A\d+B", name))


def test_the_page_lists_every_recipe(repository: Path) -> None:
    text = (repository / "docs" / "RECIPES.md").read_text()
    for recipe in RECIPES:
        devices = f"{recipe.num_devices} x {recipe.memory_gib} GB"
        row = next(line for line in text.splitlines() if f"`{recipe.name}.yaml`" in line)
        assert devices in row and all(model in row for model in recipe.models)


def test_the_commands_of_the_page_can_be_given(repository: Path) -> None:
    text = (repository / "docs" / "RECIPES.md").read_text()
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("tessel ")]
    assert {words[1] for words in commands} == {"sft", "dpo"}
    for _, verb, *flags in commands:
        flags = [str(repository / word) if word.startswith("recipes/") else word for word in flags]
        parsed = parse(RunConfig, flags, f"tessel {verb}", MEGATRON)
        validate(with_defaults(verb, parsed.value, parsed.given, None)[0])


# ------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("name", ["sft/8b", "lora/72b", "qlora/8b", "dpo/8b", "dpo/32b"])
def test_a_recipe_trains_a_small_model(
    name: str, tiny_hf_folder: Callable[..., Path], tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    folder = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder, hidden_size=64, intermediate_size=128)
    rows: list[dict[str, Any]] = [{"instruction": f"say {i}", "input": "", "output": f"{i} it is"} for i in range(16)]
    if recipe.verb == "dpo":
        turn = {"from": "human", "value": "hello"}

        def answer(text: str) -> dict[str, str]:
            return {"from": "gpt", "value": text}

        rows = [{"conversations": [turn], "chosen": answer(f"{i} yes"), "rejected": answer("no")} for i in range(16)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    argv = [recipe.verb, "--config", str(recipe.path), "--load", str(folder)]
    argv += ["--data-path", str(tmp_path / "data.json"), "--save", str(tmp_path / "run"), "--device", "cpu"]
    argv += ["--prompt-type", "default", "--seq-length", "128", "--global-batch-size", "4", "--num-train-epochs", "1"]
    assert main([*argv, "--split", "100,0,0", "--eval-iters", "0"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "train"]
    is_adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert is_adapter == (name not in ("sft/8b", "dpo/8b"))
