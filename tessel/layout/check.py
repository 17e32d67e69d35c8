"""Whether a model and a batch can be dealt out as asked: pure arithmetic, before any process group exists.

What neither the model nor the number of processes decides is checked by `tessel.config.layout_rules`.
"""

from __future__ import annotations

from collections.abc import Iterator

from tessel.config.layout import Layout
from tessel.config.layout_rules import any_of, near, sharding_strategy_of
from tessel.config.run import Batch
from tessel.errors import UsageError
from tessel.layout.asked import degrees_of, schedule_of, stages_asked
from tessel.layout.schedules import taken_near, takes
from tessel.layout.sharding import DecoderShape, ParamRule, rules
from tessel.layout.topology import Topology

# What the blocks of a parameter are, by the end of its name; the first that fits.
_BLOCKS = (
    ("q_proj", "attention heads"),
    ("o_proj", "attention heads"),
    ("k_proj", "key/value heads"),
    ("v_proj", "key/value heads"),
    ("experts", "features inside each expert"),
    ("shared_expert", "features inside the shared expert"),
    ("mlp", "features inside the MLP (--ffn-hidden-size)"),
)


def topology_of(layout: Layout, world_size: int, config: DecoderShape) -> Topology:
    """The topology of `world_size` processes for a model.

    Raises:
        UsageError: the degrees do not divide the processes, or are about experts that the model lacks.
    """
    has_experts = any(rule.is_expert for rule in rules(config).values())
    for flag, degree in (
        ("--expert-model-parallel-size", layout.expert_model_parallel_size),
        ("--expert-tensor-parallel-size", layout.expert_tensor_parallel_size or 1),
    ):
        if degree > 1 and not has_experts:
            raise UsageError(f"{flag} {degree} shares experts, and this model has none: leave {flag} out.")
    return Topology.of(degrees_of(layout), world_size)


def check_model(config: DecoderShape, layout: Layout, topology: Topology) -> None:
    """Every parameter of the model can be cut as asked, and every layer has a stage.

    Raises:
        UsageError: a degree that divides something badly; names the degrees that would do.
    """
    table = rules(config)
    per_stage = topology.world_size // topology.pp
    cuts = _cuts(table, is_expert=False)
    _check_blocks("--tensor-model-parallel-size", topology.tp, cuts, per_stage // topology.cp)
    rows = -(-config.vocab_size // topology.tp)
    if config.vocab_size <= (topology.tp - 1) * rows:
        raise UsageError(
            f"A vocabulary of {config.vocab_size} rows leaves the last of --tensor-model-parallel-size {topology.tp} "
            "processes without any: lower it."
        )
    experts = {pattern: rule for pattern, rule in table.items() if rule.is_expert}
    if experts:
        cuts = _cuts(table, is_expert=True)
        _check_blocks("--expert-tensor-parallel-size", topology.etp, cuts, per_stage // topology.ep)
        num_experts = next(iter(experts.values())).shape[0]
        if num_experts % topology.ep:
            room = per_stage // topology.etp
            fits = [n for n in range(1, room + 1) if num_experts % n == 0 and room % n == 0]
            raise UsageError(
                f"--expert-model-parallel-size {topology.ep} does not divide the {num_experts} experts of the model: "
                f"use {any_of(fits)}."
            )
        if topology.tp > 1 and not layout.sequence_parallel:
            raise UsageError(
                f"A mixture of experts on --tensor-model-parallel-size {topology.tp} needs --sequence-parallel, so "
                "that no token goes to its experts twice: add it."
            )
    stages = stages_asked(layout, config.num_hidden_layers)
    if config.tie_word_embeddings and stages.placement == "v":
        raise UsageError(
            f"--pipeline-schedule {schedule_of(layout)} puts the first and the last stage on one process, and this "
            "model's embedding and output share their weights, which it would then hold twice: take "
            "--pipeline-schedule interleaved with virtual stages, or 1f1b."
        )


def check_batch(batch: Batch, layout: Layout, topology: Topology) -> None:
    """Every global batch of the run fills the micro-batches of all replicas, and the pipeline.

    Raises:
        UsageError: it does not; names the sizes near it that would.
    """
    multiple = batch.micro_batch_size * topology.dp
    product = f"--micro-batch-size {batch.micro_batch_size} x {topology.dp} data-parallel replicas = {multiple}"
    size = batch.global_batch_size or batch.micro_batch_size
    if size % multiple:
        raise UsageError(f"--global-batch-size {size} is not a multiple of {product}: {near(size, multiple)} would be.")
    if batch.rampup_batch_size is not None:
        start, increment, samples = batch.rampup_batch_size
        if start % multiple or increment % multiple:
            raise UsageError(
                f"--rampup-batch-size {start} {increment} {samples}: the start and the increment must be multiples of "
                f"{product}; {near(start, multiple)} and {near(increment, multiple)} would be."
            )
    for step_size in _sizes(batch):
        _check_pipeline_filled(step_size, batch.micro_batch_size, layout, topology)


def check_copies(layout: Layout, topology: Topology) -> None:
    """The ranks that share a sharded state can be split into as many groups as asked.

    Raises:
        UsageError: they cannot; names the numbers that would do.
    """
    copies = layout.num_distributed_optimizer_instances
    if sharding_strategy_of(layout) == "no_shard" or copies == 1:
        return
    has_experts = topology.ep > 1 or topology.etp > 1
    fits = [n for n in range(1, topology.dp + 1) if topology.dp % n == 0 and (not has_experts or topology.edp % n == 0)]
    if copies not in fits:
        experts = f" and {topology.edp} replicas of each expert" if has_experts else ""
        raise UsageError(
            f"--num-distributed-optimizer-instances {copies} does not divide the {topology.dp} data-parallel "
            f"replicas{experts}: use {any_of(fits)}."
        )


def degrees_that_cut(config: DecoderShape, most: int) -> list[int]:
    """The tensor-parallel degrees up to `most` that every dense parameter of the model can be cut by."""
    cuts = _cuts(rules(config), is_expert=False).values()
    vocab = config.vocab_size
    return [
        n for n in range(1, most + 1) if all(_divides(n, rule) for rule in cuts) and vocab > (n - 1) * -(-vocab // n)
    ]


def _cuts(table: dict[str, ParamRule], is_expert: bool) -> dict[str, ParamRule]:
    """The parameters that are cut between whole blocks. A vocabulary is padded, so any number cuts it."""
    return {
        pattern: rule
        for pattern, rule in table.items()
        if rule.is_expert == is_expert and rule.split in ("column", "row")
    }


def _check_blocks(flag: str, degree: int, cuts: dict[str, ParamRule], room: int) -> None:
    """`degree` cuts every parameter; a remedy is also a divisor of `room`, the processes that there are for it."""
    for pattern, rule in cuts.items():
        if _divides(degree, rule):
            continue
        blocks = next((what for part, what in _BLOCKS if part in pattern.split(".")), f"blocks of {pattern}")
        fits = [n for n in range(1, room + 1) if room % n == 0 and all(_divides(n, r) for r in cuts.values())]
        raise UsageError(f"{flag} {degree} does not divide the {rule.blocks} {blocks}: use {any_of(fits)}.")


def _divides(degree: int, rule: ParamRule) -> bool:
    if rule.copies_when_short and degree > rule.blocks:
        return degree % rule.blocks == 0
    return rule.blocks % degree == 0


def _sizes(batch: Batch) -> Iterator[int]:
    """Every global batch size of the run."""
    size = batch.global_batch_size or batch.micro_batch_size
    if batch.rampup_batch_size is not None:
        start, increment, _ = batch.rampup_batch_size
        yield from range(start, size, increment)
    yield size


def _check_pipeline_filled(size: int, micro_batch_size: int, layout: Layout, topology: Topology) -> None:
    """Interleaved schedules go in whole rounds."""
    num_micro_batches, pp, schedule = size // (micro_batch_size * topology.dp), topology.pp, schedule_of(layout)
    if pp == 1 or takes(schedule, pp, num_micro_batches):
        return
    rows = micro_batch_size * topology.dp
    fits = any_of([number * rows for number in taken_near(schedule, pp, num_micro_batches)])
    raise UsageError(
        f"--pipeline-schedule {schedule} on --pipeline-model-parallel-size {pp} cannot run {num_micro_batches} "
        f"micro-batches in equal rounds, and a batch of {size} is so many on each of {topology.dp} data-parallel "
        f"replicas: make it {fits}."
    )
