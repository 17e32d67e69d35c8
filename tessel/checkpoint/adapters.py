"""Low-rank adapters on disk: PEFT's folder, a run's, MindSpeed-LLM's checkpoint; and the merge into a model.

    PEFT          adapter_config.json, adapter_model.safetensors: base_model.model.NAME.lora_A.weight [r, in],
                  .lora_B.weight [out, r], with DoRA .lora_magnitude_vector [out] (peft 0.21,
                  `peft/utils/save_and_load.py`)
    MindSpeed     mp_rank_TT[_PPP]/model_optim_rng.pt with ...linear_qkv.lora_A.default.weight among its keys, and the
                  rank and alpha in its args; one A for all projections that Megatron fuses

Every adapter is held under tessel's names (`layout/adapters.py`), whole, and in memory: it is small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessel.checkpoint import torch_file
from tessel.checkpoint.expert_adapters import is_stacked, stacked, unstacked
from tessel.checkpoint.megatron_folder import find_iteration, rank_folders
from tessel.checkpoint.safetensors import read_header, write_file
from tessel.checkpoint.stored import Derived, Index, StoredModel, StoredTensor, bounds, index_of
from tessel.checkpoint.weights import named, read_bin
from tessel.errors import TesselError, UsageError
from tessel.layout.adapters import PROJECTIONS, AdapterSpec, groups_of, is_adapter
from tessel.layout.sharding import parameters
from tessel.model.config import ModelConfig
from tessel.runtime.files import atomic_folder, require_path

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Where a run writes its trained adapter, ready for peft.
EXPORT_FOLDER = "adapter"
_PREFIX = "base_model.model."
_FUSED = re.compile(r"decoder\.layers\.(\d+)\.(self_attention|mlp)\.(linear_\w+)\.lora_(A|B)\.default\.weight")
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
# Of PEFT's settings, those that change what an adapter computes, with the values that mean nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
}


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a folder: its kind and tensors by name; `base`: the model it was trained beside, if known."""

    folder: Path
    spec: AdapterSpec
    tensors: Mapping[str, Tensor]
    base: str | None = None

    def describe(self) -> str:
        """One line."""
        spec = self.spec
        return f"adapter in {self.folder}: rank {spec.rank}, alpha {spec.alpha:g}, beside {', '.join(spec.targets)}"


def find_adapter(folder: str | Path) -> Path | None:
    """The PEFT folder at `folder`, or the one that a run has written in it; None where there is neither."""
    for path in (Path(folder), Path(folder) / EXPORT_FOLDER):
        if (path / CONFIG_FILE).is_file():
            return path
    return None


def open_adapter(folder: str | Path, config: ModelConfig) -> StoredAdapter:
    """The adapter in a folder of any kind, for a model of `config`.

    Raises:
        TesselError: there is none, it is damaged, does more than is done here, or is for another model.
    """
    folder = require_path(folder, "--lora-load")
    peft = find_adapter(folder)
    adapter = _open_peft(peft) if peft is not None else _open_megatron(folder, config)
    if config.num_experts and not any(map(is_stacked, adapter.tensors)):
        adapter = replace(adapter, spec=replace(adapter.spec, experts=False))
    _check(adapter, config)
    return adapter


def base_of(folder: str | Path) -> str | None:
    """The model that the adapter in a folder was trained beside, if it says so and it is there."""
    peft = find_adapter(require_path(folder, "--lora-load"))
    base = None if peft is None else _settings(peft / CONFIG_FILE).get("base_model_name_or_path")
    return base if isinstance(base, str) and Path(base).is_dir() else None


def check_asked(
    adapter: StoredAdapter, rank: int | None, alpha: float | None, groups: tuple[tuple[str, ...], ...] | None
) -> None:
    """What the flags say of an adapter is what is stored.

    Raises:
        UsageError: --lora-r, --lora-alpha or --lora-target-modules is another one.
    """
    spec = adapter.spec
    differs = [
        f"{flag} {ours:g} (stored: {stored:g})"
        for flag, ours, stored in (("--lora-r", rank, spec.rank), ("--lora-alpha", alpha, spec.alpha))
        if ours is not None and ours != stored
    ]
    asked = {name for group in groups or () for name in group}
    if groups is not None and asked != set(spec.targets):
        differs.append(f"--lora-target-modules {' '.join(sorted(asked))} (stored: {' '.join(spec.targets)})")
    if differs:
        raise UsageError(
            f"--lora-load {adapter.folder} holds another adapter than {'; '.join(differs)}. Leave these flags out: "
            "the adapter says what it is."
        )


def _check(adapter: StoredAdapter, config: ModelConfig) -> None:
    wanted = {
        name: rule.shape
        for name, rule in parameters(replace(config, adapters=adapter.spec)).items()
        if is_adapter(name)
    }
    missing = [name for name in wanted if name not in adapter.tensors]
    surplus = [name for name in adapter.tensors if name not in wanted]
    misshapen = [
        f"{name} is {tuple(adapter.tensors[name].shape)} and should be {shape}"
        for name, shape in wanted.items()
        if name in adapter.tensors and tuple(adapter.tensors[name].shape) != shape
    ]
    found = [
        f"{len(names)} {what}: {named(names)}"
        for what, names in (("missing", missing), ("surplus", surplus), ("of another shape", misshapen))
        if names
    ]
    if found:
        base = f" (it was trained beside {adapter.base})" if adapter.base else ""
        raise TesselError(
            f"The adapter in {adapter.folder} is not for this model{base}; tensors {'; '.join(found)}. Load the model "
            "that it was trained beside."
        )


# ----------------------------------------------------------------------------------------- PEFT


def _open_peft(folder: Path) -> StoredAdapter:
    settings = _settings(folder / CONFIG_FILE)
    for key, plain in _PLAIN.items():
        if key in settings and settings[key] not in plain:
            raise TesselError(f"{folder / CONFIG_FILE}: {key} is {settings[key]!r}, which is not done here.")
    path = folder / WEIGHTS_FILE
    if path.is_file():
        stored: Mapping[str, StoredTensor] = dict(read_header(path))
    elif path.with_suffix(".bin").is_file():
        stored = dict(read_bin(path.with_suffix(".bin")))
    else:
        raise TesselError(f"{folder} has no {WEIGHTS_FILE}. Take the whole adapter again.")
    tensors = {}
    for name, tensor in stored.items():
        own = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?", name)
        if own is None:
            raise TesselError(f"{folder / WEIGHTS_FILE}: {name[:200]} is no part of a LoRA adapter.")
        tensors[f"{own[1]}.lora.{own[2].removesuffix('_vector')}"] = tensor.read().float()
    projections = {name.split(".lora.")[0].rpartition(".")[2] for name in tensors}
    unknown = sorted(projections - set(PROJECTIONS))
    if unknown or not projections:
        raise TesselError(
            f"The adapter in {folder} is beside {', '.join(unknown) or 'nothing'}; adapters here are beside "
            f"{', '.join(PROJECTIONS)}."
        )
    spec = AdapterSpec(
        _positive(settings, "r", folder),
        float(settings.get("lora_alpha") or 8),
        groups_of(sorted(projections)),
        float(settings.get("lora_dropout") or 0.0),
        bool(settings.get("use_rslora")),
        dora=bool(settings.get("use_dora")),
    )
    base = settings.get("base_model_name_or_path")
    return StoredAdapter(folder, spec, stacked(tensors), str(base) if base else None)


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TesselError(f"{path}: not valid JSON ({error}). Take the adapter again.") from error
    if not isinstance(settings, dict) or settings.get("peft_type", "LORA") != "LORA":
        raise TesselError(f"{path} does not describe a LoRA adapter. Adapters of other kinds are not read here.")
    return settings


def _positive(settings: Mapping[str, Any], key: str, folder: Path) -> int:
    value = settings.get(key)
    if type(value) is not int or value < 1:
        raise TesselError(f"{folder / CONFIG_FILE}: {key} is {value!r}; it must be a number above 0.")
    return value


def _peft_name(name: str) -> str:
    module, _, leaf = name.rpartition(".lora.")
    return f"{module}.lora_magnitude_vector" if leaf == "magnitude" else f"{module}.lora_{leaf}.weight"


def write_peft(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    spec: AdapterSpec,
    base: str | None,
    side_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` opens, whole or not at all.

    Projections that share an A each get a copy of it, which changes no result.
    """
    held = unstacked(dict(tensors))
    for name in [name for name in held if name.endswith(".lora.B")]:
        module, _, projection = name.removesuffix(".lora.B").rpartition(".")
        held.setdefault(f"{module}.{projection}.lora.A", held[f"{module}.{spec.owner(projection)}.lora.A"])
    renamed = [(_PREFIX + _peft_name(name), held[name]) for name in sorted(held)]
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "target_modules": list(spec.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": spec.dora,
        "use_rslora": spec.rslora,
    }
    if folder.exists() and not (folder / CONFIG_FILE).is_file() and any(folder.iterdir()):
        raise TesselError(f"{folder} exists and is no adapter, so it is not replaced. Move it away.")
    with atomic_folder(folder) as temporary:
        write_file(temporary / WEIGHTS_FILE, renamed, torch.float32)
        (temporary / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for name, content in (side_files or {}).items():
            if name != "generation_config.json":
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)


# ----------------------------------------------------------------------------------------- Megatron


def _open_megatron(folder: Path, config: ModelConfig) -> StoredAdapter:
    iteration = find_iteration(folder)
    ranks = rank_folders(iteration.path)
    by_place: dict[tuple[int, int], tuple[Path, dict[str, Any]]] = {}
    for name, path in ranks.items():
        place = _RANK.fullmatch(name)
        assert place is not None
        file = next(iter(sorted(path.glob("model_*.pt"))), None)
        if file is None or place[3] is not None:
            raise TesselError(f"{path} has no model_optim_rng.pt, or is of several expert ranks, which is not read.")
        by_place[int(place[1]), int(place[2] or 0)] = (file, torch_file.load(file))
    if not by_place:
        raise TesselError(
            f"--lora-load {folder} holds no adapter: looked for {CONFIG_FILE}, {EXPORT_FOLDER}/{CONFIG_FILE} and "
            "mp_rank_* folders."
        )
    fused = _joined(by_place, folder)
    stored_args = next(iter(by_place.values()))[1].get("args")
    args = {} if stored_args is None else vars(stored_args)
    rank, alpha = args.get("lora_r"), args.get("lora_alpha")
    if type(rank) is not int or not isinstance(alpha, int | float):
        raise TesselError(f"{folder}: its args have no lora_r and lora_alpha, so the adapter's scale is not known.")
    targets = sorted({name for _, _, name in fused})
    spec = AdapterSpec(rank, float(alpha), groups_of(targets))
    tensors = {
        name: tensor for (layer, part, target) in fused for name, tensor in _unfused(fused, layer, part, target, config)
    }
    return StoredAdapter(folder, spec, tensors)


_Fused = dict[tuple[int, str, str], dict[str, Tensor]]


def _joined(by_place: Mapping[tuple[int, int], tuple[Path, dict[str, Any]]], folder: Path) -> _Fused:
    """A and B of every fused projection by (layer, block, name), ranks put together."""
    num_tp, num_pp = max(tp for tp, _ in by_place) + 1, max(pp for _, pp in by_place) + 1
    fused: _Fused = {}
    first = 0
    for pp in range(num_pp):
        parts: dict[tuple[int, str, str, str], list[Tensor]] = {}
        for tp in range(num_tp):
            if (tp, pp) not in by_place:
                raise TesselError(f"{folder} lacks the files of tensor-parallel rank {tp}, stage {pp}.")
            path, content = by_place[tp, pp]
            model = content.get("model") if isinstance(content, dict) else None
            if not isinstance(model, dict):
                raise TesselError(f"{path} has no model, or one of several chunks, whose adapters are not read.")
            for key, tensor in model.items():
                match = _FUSED.fullmatch(key)
                if match is not None and isinstance(tensor, Tensor):
                    parts.setdefault((int(match[1]), match[2], match[3], match[4]), []).append(tensor.float())
        if not parts:
            raise TesselError(f"{folder}: stage {pp} has no tensors of an adapter (...lora_A.default.weight).")
        for (layer, block, name, which), tensors in parts.items():
            fused.setdefault((first + layer, block, name), {})[which] = _put_together(name, which, tensors)
        first += 1 + max(layer for layer, *_ in parts)
    return fused


def _put_together(name: str, which: str, tensors: list[Tensor]) -> Tensor:
    column = name in ("linear_qkv", "linear_fc1")
    if (which == "A") == column or len(tensors) == 1:
        return tensors[0]  # every rank has the whole
    if name == "linear_fc1":
        halves = [tensor.chunk(2) for tensor in tensors]
        return torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)])
    return torch.cat(tensors, dim=0 if column else 1)


def _unfused(fused: _Fused, layer: int, block: str, name: str, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    pair = fused[layer, block, name]
    if set(pair) != {"A", "B"}:
        raise TesselError(f"Layer {layer} has only one of lora_A and lora_B of {name}.")
    prefix = f"model.layers.{layer}.{'self_attn' if block == 'self_attention' else 'mlp'}."
    (projections,) = groups_of([name])
    yield f"{prefix}{projections[0]}.lora.A", pair["A"]
    yield from zip((f"{prefix}{p}.lora.B" for p in projections), _rows(name, pair["B"], config), strict=True)


def _rows(name: str, b: Tensor, config: ModelConfig) -> list[Tensor]:
    """The rows of each projection in B of a fused one; see `fused.py` for their order."""
    if name == "linear_fc1":
        return list(b.chunk(2))
    if name != "linear_qkv":
        return [b]
    groups, head = config.num_key_value_heads, config.head_dim
    per_group = config.num_attention_heads // groups
    if b.shape[0] != groups * (per_group + 2) * head:
        raise TesselError(f"lora_B of linear_qkv has {b.shape[0]} rows, and the model's attention has others.")
    rows = b.view(groups, per_group + 2, head, -1)
    return [rows[:, part].reshape(-1, b.shape[1]) for part in (slice(per_group), slice(-2, -1), slice(-1, None))]


# ----------------------------------------------------------------------------------------- merging


@dataclass(frozen=True)
class Merged(Derived):
    """A weight with its adapter: W + scale B A, computed in fp32 and rounded to W's own dtype.

    With `magnitude`, each row of that has this length (DoRA).
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def read(self, index: Index | None = None) -> Tensor:
        """The box `index`, or all of it."""
        *experts, (top, bottom), (left, right) = bounds(index, self.shape)
        if self.magnitude is None:
            lead = index_of(experts)
            product = self.b[(*lead, slice(top, bottom))] @ self.a[(*lead, slice(None), slice(left, right))]
            return (self.source.read(index).float() + self.scale * product).to(self.dtype)
        rows = self.source.read((slice(top, bottom), slice(0, self.shape[1]))).float()
        rows = rows + self.scale * (self.b[top:bottom] @ self.a)
        factor = self.magnitude[top:bottom] / rows.norm(dim=1)
        return (factor[:, None] * rows[:, left:right]).to(self.dtype)


def merged(model: StoredModel, adapter: StoredAdapter) -> StoredModel:
    """The model with the adapter in its weights. Optimizer states, which are of the weights before, stay behind."""
    tensors, held, spec = dict(model.tensors), adapter.tensors, adapter.spec
    for name, b in held.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "B" and is_stacked(name):
            experts, _, projection = module.rpartition(".")
            a, magnitude = held[f"{experts}.{spec.owner(projection)}.A"], None
            weight = f"{experts.removesuffix('.lora')}.{projection}"
        elif leaf == "B":
            block, _, projection = module.removesuffix(".lora").rpartition(".")
            a = held[f"{block}.{spec.owner(projection)}.lora.A"]
            weight, magnitude = f"{block}.{projection}.weight", held.get(f"{module}.magnitude")
        else:
            continue
        tensors[weight] = Merged(tensors[weight], a, b, spec.scale, magnitude)
    return replace(model, tensors=tensors, optimizer={}, state={})
