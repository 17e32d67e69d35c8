"""Legacy checkpoints: there and back in every layout of ranks, older orders of q, k and v, the optimizer, bad input."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.checkpoint.detect import format_of, open_model
from tessel.checkpoint.legacy import open_legacy, plan_legacy, write_legacy
from tessel.checkpoint.stored import StoredModel, Target
from tessel.errors import TesselError, UsageError
from tests.checkpoint.megatron import different, hf_model

RANK = "iter_0000001/mp_rank_01_001/model_optim_rng.pt"
QKV = "self_attention.query_key_value"


@pytest.fixture
def model(tiny_hf_folder: Callable[..., Path]) -> Callable[..., StoredModel]:
    def make(family: str, **overrides: Any) -> StoredModel:
        return hf_model(tiny_hf_folder(family, num_hidden_layers=4, **overrides))

    return make


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", False), ("qwen2", True), ("mistral", True)])
@pytest.mark.parametrize(
    "target",
    [
        Target(),
        Target(tp=2, flavour="v1"),
        Target(pp=4),
        Target(tp=2, pp=2, num_chunks=2),
        Target(pp=2, layer_list=(1, 3), iteration=None),
        Target(pp=2, num_chunks=2, placement="v"),
        Target(pp=2, noop_layers=(0, 5), iteration=7),
    ],
)
def test_there_and_back(
    model: Callable[..., StoredModel], tmp_path: Path, family: str, tied: bool, target: Target
) -> None:
    source = model(family, tie_word_embeddings=tied)
    write_legacy(source, tmp_path / "mg", target)
    assert format_of(tmp_path / "mg") == "legacy"
    found = open_model(tmp_path / "mg")
    assert different(found.tensors, source.tensors) == []
    assert (found.config, found.guessed, found.iteration) == (source.config, (), target.iteration)


def test_biases_everywhere(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    source = model("llama", attention_bias=True, mlp_bias=True)
    write_legacy(source, tmp_path, Target(tp=2, pp=2))
    assert different(open_legacy(tmp_path).tensors, source.tensors) == []


def test_the_config_can_come_from_the_args(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    for family in ("llama", "qwen2"):
        source = model(family)
        write_legacy(source, tmp_path / family, Target(tp=2, pp=2))
        shutil.rmtree(tmp_path / family / "huggingface")
        found = open_legacy(tmp_path / family)
        assert different(found.tensors, source.tensors) == []
        assert found.guessed and found.config.family == family


def test_a_tied_models_copy_lies_beside_the_language_model(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    write_legacy(model("qwen2", tie_word_embeddings=True), tmp_path, Target(pp=2))
    last = torch.load(tmp_path / "iter_0000001/mp_rank_00_001/model_optim_rng.pt", weights_only=False)["model"]
    assert set(last) == {"language_model", "word_embeddings_for_head"}
    assert set(last["language_model"]) == {"encoder"}
    edit(
        tmp_path / "iter_0000001/mp_rank_00_001/model_optim_rng.pt",
        lambda content: content["model"]["word_embeddings_for_head"]["weight"][5].add_(1),
    )
    with pytest.raises(TesselError, match="differs from the embedding"):
        open_legacy(tmp_path)


def older(version: float) -> Callable[[dict[str, Any]], None]:
    """What makes a file of today's that of an older version: its order of q, k and v, names and args."""

    def change(content: dict[str, Any]) -> None:
        args = content["args"]
        head = args.kv_channels
        content["checkpoint_version"] = version
        args.model_parallel_size = args.tensor_model_parallel_size
        del args.tensor_model_parallel_size
        for chunk in (key for key in list(content) if key.startswith("model")):
            parts = content[chunk]["language_model"]
            layers = parts.pop("encoder")
            names = {"self_attention.": "attention.", "_norm.": "_layernorm."} if version < 2 else {}
            renamed = {}
            for key, value in layers.items():
                if value is not None and QKV in key and version < 2:
                    heads = value.unflatten(0, (-1, 3, head))
                    value = (heads.transpose(0, 1) if version == 0 else heads.transpose(1, 2)).reshape(value.shape)
                for new, old in names.items():
                    key = key.replace(new, old)
                renamed[key] = value
            parts["transformer" if version < 2 else "encoder"] = renamed

    return change


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
def test_older_versions(model: Callable[..., StoredModel], tmp_path: Path, version: float) -> None:
    source = model("qwen2", num_key_value_heads=4, tie_word_embeddings=version == 1.0)
    write_legacy(source, tmp_path, Target(tp=2, pp=2, num_chunks=2))
    for path in tmp_path.rglob("*.pt"):
        edit(path, older(version))
    found = open_model(tmp_path)
    assert different(found.tensors, source.tensors) == []
    assert found.degrees == {"tp": 2, "pp": 2, "chunks": 2}
    name = "model.layers.3.self_attn.k_proj.weight"
    box = (slice(3, 29), slice(5, 9))
    assert torch.equal(found.tensors[name].read(box), source.tensors[name].read(box))


def test_old_versions_had_no_query_groups(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    write_legacy(model("llama"), tmp_path, Target(tp=2, pp=2))
    edit(tmp_path / RANK, lambda content: content.update(checkpoint_version=0))
    with pytest.raises(TesselError, match="checkpoint_version 0 and 2 key/value heads for 4 heads"):
        open_legacy(tmp_path)


def test_what_is_wrong_is_named_as_the_files_have_it(model: Callable[..., StoredModel], tmp_path: Path) -> None:
    write_legacy(model("qwen2"), tmp_path, Target(tp=2, pp=2))
    path = tmp_path / RANK
    key = f"layers.1.{QKV}.weight"

    def encoder(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
        return lambda content: change(content["model"]["language_model"]["encoder"])

    edit(path, encoder(lambda layers: layers.update(former=layers.pop(key))))
    with pytest.raises(TesselError, match=rf"missing: mp_rank_01_001: language_model\.encoder\.{key}.*former is not"):
        open_legacy(tmp_path)
    edit(path, encoder(lambda layers: layers.update({key: layers.pop("former")[1:]})))
    with pytest.raises(TesselError, match=rf"{key} is \(31, 32\) and should be \(32, 32\)"):
        open_legacy(tmp_path)
    edit(path, encoder(lambda layers: layers.update({"layers.0.input_layernorm.weight": torch.ones(32)})))
    with pytest.raises(TesselError, match="twice, under two names"):
        open_legacy(tmp_path)
    edit(path, lambda content: content.update(model={"language_model": [1]}))
    with pytest.raises(TesselError, match="should be tensors"):
        open_legacy(tmp_path)
    edit(path, lambda content: content.update(model=[1]))
    with pytest.raises(TesselError, match="not nested as Megatron's were"):
        open_legacy(tmp_path)


def test_models_that_the_format_cannot_hold(model: Callable[..., StoredModel]) -> None:
    with pytest.raises(UsageError, match="no names for the norms of q and k of a qwen3 model. Use --to torch"):
        plan_legacy(model("qwen3"), Target())
    with pytest.raises(UsageError, match="no names for the experts"):
        plan_legacy(model("mixtral"), Target())


def flat(state: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of nested dictionaries, in order."""
    values = [flat(value) if isinstance(value, dict) else [value] for value in state.values() if value is not None]
    return [tensor for part in values for tensor in part]


def with_optimizer(content: dict[str, Any]) -> None:
    """Add the state of Megatron's Adam in mixed precision; its moments are 2 and 3 times the weights."""
    weights = [tensor.float() for key in content if key.startswith("model") for tensor in flat(content[key])]
    groups = [[w for w in weights if w.dim() > 1], [w for w in weights if w.dim() == 1]]
    numbers = iter(range(len(weights)))
    param_groups = [
        {"params": [next(numbers) for _ in group], "wd_mult": wd_mult, "lr": 0.1}
        for group, wd_mult in zip(groups, (1.0, 0.0), strict=True)
    ]
    state = {
        number: {"step": torch.tensor(4.0), "exp_avg": 2 * weight, "exp_avg_sq": 3 * weight}
        for number, weight in enumerate(groups[0] + groups[1])
    }
    content["optimizer"] = {
        "optimizer": {"state": state, "param_groups": param_groups},
        "fp32_from_fp16_params": groups,
    }


@pytest.mark.parametrize("version", [0, 2.0, 3.0])
def test_the_optimizer_is_read(model: Callable[..., StoredModel], tmp_path: Path, version: float) -> None:
    source = model("qwen2", num_key_value_heads=4, tie_word_embeddings=True)
    write_legacy(source, tmp_path, Target(tp=2, pp=2, num_chunks=2, dtype=torch.bfloat16))
    for path in tmp_path.rglob("*.pt"):
        edit(path, older(version))
        edit(path, with_optimizer)
    found = open_model(tmp_path)
    assert (found.left_out, found.state["step"]) == ((), 4)
    for name, tensor in found.tensors.items():
        for kind, factor in (("param", 1), ("exp_avg", 2), ("exp_avg_sq", 3)):
            assert torch.equal(found.optimizer[f"{kind}.{name}"].read(), factor * tensor.read().float()), name
