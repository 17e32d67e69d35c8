"""`tessel plan`: the layouts of a model that fit on a cluster, what they cost, and the best as a file for pretrain."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tessel.config.layout import Layout
from tessel.config.plan_rules import devices_of
from tessel.config.verbs import PlanConfig, PlanLayout
from tessel.errors import TesselError, UsageError
from tessel.layout.check import check_model, topology_of
from tessel.layout.choice import RecomputeChoice
from tessel.layout.cost import CostModel
from tessel.layout.memory import MemoryModel
from tessel.layout.rates import Rates, known_rates, likely_kind, rates_from
from tessel.layout.search import Cluster, Findings, Found, Wanted, search
from tessel.layout.sharding import parameters
from tessel.model.catalog import model_of
from tessel.model.config import ModelConfig
from tessel.report.facts import count_text
from tessel.report.plan_file import yaml_of

GIB = 2**30
# Left out where the terminal is too narrow.
_PARTS = {
    "weights": "parameters",
    "grads": "gradients",
    "moments": "optimizer",
    "gathered": "gathered",
    "activations": "activations",
    "loss": "loss",
}
_DEGREES: dict[str, Callable[[Found], int]] = {
    "TP": lambda found: found.choice.topology.tp,
    "PP": lambda found: found.choice.topology.pp,
    "VPP": lambda found: found.choice.num_chunks,
    "CP": lambda found: found.choice.topology.cp,
    "EP": lambda found: found.choice.topology.ep,
    "DP": lambda found: found.choice.topology.dp,
    "MBS": lambda found: found.choice.micro_batch_size,
}
_RECOMPUTE: tuple[RecomputeChoice, ...] = ("none", "selective", "mlp", "full")


def plan(cfg: PlanConfig) -> None:
    """`tessel plan`: print a table, and write the best layout to --output.

    Raises:
        UsageError: the model is not known, or no layout fits; says what would.
        TesselError: a file cannot be read or written.
    """
    config = model_of(cfg.model)
    number, memory_gib = devices_of(cfg.devices)
    cluster = Cluster(number, int(memory_gib * GIB), cfg.devices_per_node)
    rates, source = _rates(cfg, memory_gib)
    model = MemoryModel(config)
    cost = CostModel(model, rates, cfg.devices_per_node)
    wanted = _wanted(cfg)
    _check_pins(cfg.pinned, config, number)
    findings = search(model, cost, cluster, wanted)
    if not findings.fitting:
        raise UsageError(_nothing_fits(cfg, model, cost, cluster, wanted, findings))
    best = findings.fitting[0]
    for line in _head(cfg, config, cluster, source):
        print(line)
    _print_table(findings.fitting[: cfg.top])
    for line in _tail(cfg, config, model, findings):
        print(line)
    if cfg.output is not None:
        _write(Path(cfg.output), yaml_of(best, cfg, config.num_experts > 0))


def _rates(cfg: PlanConfig, memory_gib: float) -> tuple[Rates, str]:
    """The rates, and where they come from."""
    if cfg.rates is None:
        kind = cfg.device_kind or likely_kind(memory_gib)
        guess = "" if cfg.device_kind else ", going by the memory; --device-kind and --rates say otherwise"
        return known_rates(kind), f"{kind}{guess}"
    import yaml  # only needed here

    try:
        values = yaml.safe_load(Path(cfg.rates).read_text(encoding="utf-8"))
    except OSError as error:
        raise TesselError(f"--rates {cfg.rates} cannot be read: {error.strerror}. Give a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise TesselError(f"--rates {cfg.rates} is not YAML. Mend the file.") from None
    if not isinstance(values, dict):
        raise UsageError(f"--rates {cfg.rates} holds no names with values, such as matmul_tflops: 700.")
    return rates_from(values, cfg.rates), cfg.rates


def _wanted(cfg: PlanConfig) -> Wanted:
    pinned = cfg.pinned
    return Wanted(
        seq_length=cfg.seq_length,
        global_batch_size=cfg.global_batch_size,
        compute_bytes=4 if cfg.fp32 else 2,
        micro_batch_size=pinned.micro_batch_size,
        tp=pinned.tensor_model_parallel_size,
        pp=pinned.pipeline_model_parallel_size,
        cp=pinned.context_parallel_size,
        ep=pinned.expert_model_parallel_size,
        etp=pinned.expert_tensor_parallel_size,
        sharding_strategy=pinned.data_parallel_sharding_strategy,
        recompute=cast("RecomputeChoice | None", pinned.recompute),
    )


def _check_pins(pinned: PlanLayout, config: ModelConfig, num_devices: int) -> None:
    """What a run with these degrees would refuse, the others being 1."""
    layout = Layout(
        tensor_model_parallel_size=pinned.tensor_model_parallel_size or 1,
        sequence_parallel=True,
        context_parallel_size=pinned.context_parallel_size or 1,
        pipeline_model_parallel_size=pinned.pipeline_model_parallel_size or 1,
        expert_model_parallel_size=pinned.expert_model_parallel_size or 1,
        expert_tensor_parallel_size=pinned.expert_tensor_parallel_size or (1 if config.num_experts else None),
    )
    topology = topology_of(layout, num_devices, config)
    # Layers need not divide: they are dealt out by a list.
    check_model(config, replace(layout, pipeline_model_parallel_size=1), topology)


def _head(cfg: PlanConfig, config: ModelConfig, cluster: Cluster, source: str) -> Iterator[str]:
    total = sum(math.prod(rule.shape) for rule in parameters(config).values())
    yield f"{cfg.model}: {count_text(total)} parameters"
    devices = f"{cluster.num_devices} devices of {cluster.memory_bytes / GIB:g} GiB"
    usable = f"{cluster.usable_bytes / GIB:.1f} are usable"
    yield f"{devices}, of which {usable}, {cluster.devices_per_node} on a machine"
    precision = "fp32" if cfg.fp32 else "bf16, fp32 weights and moments"
    yield f"{cfg.global_batch_size:,} sequences of {cfg.seq_length:,} tokens a step, {precision}"
    yield f"rates: {source}"
    if cfg.seq_length > config.max_position_embeddings:
        yield f"note: config.json allows {config.max_position_embeddings:,} positions, and pretrain refuses more"


def _print_table(rows: tuple[Found, ...]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    columns = _columns(rows)
    if sys.stdout.isatty() and Console().width < _width(columns):
        columns = {name: cells for name, cells in columns.items() if name not in _PARTS}
    console = Console(width=_width(columns), highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name.strip(), justify="left" if name in ("sharding", "recompute") else "right", no_wrap=True)
    for number, row in enumerate(zip(*columns.values(), strict=True)):
        table.add_row(*row, style="bold" if number == 0 else None)
    console.print(table)


def _columns(rows: tuple[Found, ...]) -> dict[str, list[str]]:
    """The table by its columns; axes that nobody uses are left out."""

    def cells(value: Callable[[Found], Any]) -> list[str]:
        return [str(value(found)) for found in rows]

    columns = {" ": ["best", *[""] * (len(rows) - 1)]}
    for name, degree in _DEGREES.items():
        shown = cells(degree)
        if name in ("TP", "DP", "MBS") or set(shown) != {"1"}:
            columns[name] = shown
    columns["sharding"] = cells(lambda found: found.choice.sharding_strategy)
    columns["recompute"] = cells(lambda found: found.choice.recompute)
    columns["GiB"] = cells(lambda found: f"{found.memory.peak / GIB:.1f}")
    for name, part in _PARTS.items():
        columns[name] = [f"{getattr(found.memory, part) / GIB:.1f}" for found in rows]
    for axis in ("tp", "cp", "pp", "ep", "dp"):
        if any(found.cost.sent[axis] for found in rows):
            columns[f"{axis} GB"] = [f"{found.cost.sent[axis] / 1e9:.1f}" for found in rows]
    columns["bubble"] = cells(lambda found: f"{found.cost.bubble:.1%}")
    columns["step s"] = cells(lambda found: f"{found.cost.step_s:.2f}")
    columns["tokens/s/device"] = cells(lambda found: f"{_tokens_per_s(found):,.0f}")
    return columns


def _width(columns: dict[str, list[str]]) -> int:
    """Characters of a line of the table."""
    return sum(max(len(cell) for cell in (name, *cells)) + 2 for name, cells in columns.items()) + 2


def _tokens_per_s(found: Found) -> float:
    """Of one device."""
    choice = found.choice
    return choice.seq_length * choice.global_batch_size / choice.topology.world_size / found.cost.step_s


def _tail(cfg: PlanConfig, config: ModelConfig, model: MemoryModel, findings: Findings) -> Iterator[str]:
    best = findings.fitting[0]
    yield "GiB: the most at one time on the fullest rank, which is less than its parts' sum"
    yield "GB: sent by one rank in a step"
    parts = []
    for recompute in _RECOMPUTE:
        memory = model.of_rank(replace(best.choice, recompute=recompute), best.rank)
        parts.append(f"{recompute} {memory.activations / GIB:.1f} (in all {memory.peak / GIB:.1f})")
    yield f"activations of the best by recomputation, GiB: {', '.join(parts)}"
    if len(findings.fitting) > cfg.top:
        yield f"{len(findings.fitting) - cfg.top} more fit; --top {len(findings.fitting)} lists them"
    if cfg.output is None:
        yield "--output plan.yaml writes the best, for tessel pretrain --config"
        return
    number = best.choice.topology.world_size
    per_node, rest = divmod(number, cfg.devices_per_node)
    start = f"pretrain --config {cfg.output} --data-path ... --lr ... --train-iters ..."
    if per_node <= 1 and not (per_node and rest):
        yield f"start it: tessel {start} --nproc-per-node {number}"
    else:
        yield f"start it on each machine: torchrun --nproc-per-node {cfg.devices_per_node} ... -m tessel {start}"


def _nothing_fits(
    cfg: PlanConfig, model: MemoryModel, cost: CostModel, cluster: Cluster, wanted: Wanted, findings: Findings
) -> str:
    """What is lacking, and what would do."""
    if findings.least is None:
        return (
            f"No layout deals {cfg.global_batch_size} sequences of {cfg.seq_length} tokens out to "
            f"{cluster.num_devices} devices: take a --global-batch-size such as {cluster.num_devices}, a --seq-length "
            "that is a multiple of 1024, or give fewer degrees."
        )
    choice, memory = findings.least
    remedies = []
    for number in (cluster.num_devices * 2**power for power in range(1, 8)):
        if search(model, cost, replace(cluster, num_devices=number), wanted).fitting:
            remedies.append(f"{number} devices")
            break
    for seq_length in (cfg.seq_length // 2**power for power in range(1, 6)):
        if seq_length and search(model, cost, cluster, replace(wanted, seq_length=seq_length)).fitting:
            remedies.append(f"--seq-length {seq_length}")
            break
    if (
        wanted != _wanted(replace(cfg, pinned=PlanLayout()))
        and search(model, cost, cluster, _wanted(replace(cfg, pinned=PlanLayout()))).fitting
    ):
        remedies.append("fewer given degrees")
    remedies.append(f"devices of {math.ceil(memory.peak / cluster.usable_bytes * cluster.memory_bytes / GIB)} GB")
    return (
        f"No layout of {cfg.model} fits {cfg.devices}: the smallest ({choice.topology.describe()}, "
        f"{choice.sharding_strategy}, recompute {choice.recompute}) needs {memory.peak / GIB:.1f} GiB on a device, of "
        f"which {cluster.usable_bytes / GIB:.1f} are usable. It would fit with {', or with '.join(remedies)}."
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TesselError(f"--output {path} cannot be written: {error.strerror}. Choose another path.") from None
    print(f"written: {path}")
