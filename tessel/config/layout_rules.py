"""The static rules of a layout: those that hold whatever the model and the number of processes.

As in `rules.py`, each function checks one matter and raises a UsageError with the remedy. What the model
or the number of processes decides is checked by `tessel.layout.check`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tessel.config.context import check_context_parallel
from tessel.config.layout import Layout
from tessel.config.run import RunConfig
from tessel.errors import UsageError

# Their backward is split in two, between which weights must stay gathered; see `check_pipeline_schedule`.
SPLIT_BACKWARD = ("interleaved-zero-bubble", "zbv")
# Stages of a pipeline rank under `zbv`, which runs down the ranks and up again.
ZBV_STAGES = 2


def sharding_strategy_of(layout: Layout) -> str:
    """What data-parallel ranks share: one of `SHARDING_STRATEGIES`.

    --data-parallel-sharding-strategy, where it is given; else --use-distributed-optimizer means `optim`.
    """
    if layout.data_parallel_sharding_strategy is not None:
        return layout.data_parallel_sharding_strategy
    return "optim" if layout.use_distributed_optimizer else "no_shard"


def whole_numbers(flag: str, text: str | None) -> tuple[int, ...] | None:
    """The numbers of a list such as `6,8,8,6`, none of them negative; None where it is not given.

    Raises:
        UsageError: it is no such list.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{flag} is {text!r}: it must be whole numbers apart by commas, such as 6,8,8,6.")
    return tuple(int(part) for part in parts)


def near(value: int, multiple: int) -> str:
    """The multiples on both sides of a value, as the end of a remedy: `8 or 16`."""
    below = value // multiple * multiple
    return " or ".join(str(n) for n in (below, below + multiple) if n)


def any_of(values: Sequence[int]) -> str:
    """Some numbers in words: `1, 2 or 4`."""
    return " or ".join(filter(None, [", ".join(map(str, values[:-1])), str(values[-1])]))


def check_tensor_parallel(cfg: RunConfig) -> None:
    """What only tensor-parallel ranks can do."""
    layout = cfg.layout
    if layout.sequence_parallel and layout.tensor_model_parallel_size == 1:
        raise UsageError(
            "--sequence-parallel shares tokens between tensor-parallel processes, and --tensor-model-parallel-size is "
            "1: raise it to 2 or more, or leave --sequence-parallel out."
        )


def check_pipeline_stages(cfg: RunConfig) -> None:
    """Ways of dealing out layers that exclude each other."""
    layout = cfg.layout
    layers = whole_numbers("--num-layer-list", layout.num_layer_list)
    whole_numbers("--noop-layers", layout.noop_layers)
    first, last = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    pp = layout.pipeline_model_parallel_size
    ends = [
        f"--decoder-{end}-pipeline-num-layers" for end, given in (("first", first), ("last", last)) if given is not None
    ]
    for flag in (["--num-layer-list"] if layers is not None else []) + ends:
        if pp == 1:
            raise UsageError(
                f"{flag} deals layers out to pipeline stages, and --pipeline-model-parallel-size is 1: raise it to 2 "
                f"or more, or leave {flag} out."
            )
    if layers is None:
        return
    if ends:
        raise UsageError(f"--num-layer-list {layout.num_layer_list} says what {ends[0]} says, too: keep one of them.")
    if len(layers) != pp:
        raise UsageError(
            f"--num-layer-list {layout.num_layer_list} has {len(layers)} entries: it must have one for each of "
            f"--pipeline-model-parallel-size {pp} stages."
        )
    virtual = _virtual_flags(layout)
    if virtual:
        raise UsageError(
            f"--num-layer-list {layout.num_layer_list} does not go with virtual pipeline stages: leave out one of "
            f"--num-layer-list and {virtual[0]}."
        )


def check_virtual_stages(cfg: RunConfig) -> None:
    """Virtual stages of a pipeline."""
    layout = cfg.layout
    virtual = _virtual_flags(layout)
    if len(virtual) > 1:
        raise UsageError(f"{' and '.join(virtual)} both say how many virtual stages there are: keep one of them.")
    if not virtual:
        return
    flag, pp = virtual[0], layout.pipeline_model_parallel_size
    if pp == 1:
        raise UsageError(
            f"{flag} makes virtual stages of a pipeline, and --pipeline-model-parallel-size is 1: raise it to 2 or "
            f"more, or leave {flag} out."
        )
    ends = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    if layout.num_layers_per_virtual_pipeline_stage is not None and any(end is not None for end in ends):
        raise UsageError(
            f"{flag} {layout.num_layers_per_virtual_pipeline_stage} makes all virtual stages alike, and "
            "--decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers does not: use "
            "--num-virtual-stages-per-pipeline-rank with them."
        )


def check_pipeline_schedule(cfg: RunConfig) -> None:
    """A schedule and the stages it is for.

    Split-backward schedules run the two halves of a stage's backward at different times. With weights
    that are dropped after forward, the second half would compute with what is not there.
    """
    layout = cfg.layout
    schedule, pp, virtual = layout.pipeline_schedule, layout.pipeline_model_parallel_size, _virtual_flags(layout)
    if schedule is None:
        return
    if pp == 1:
        raise UsageError(
            f"--pipeline-schedule {schedule} needs --pipeline-model-parallel-size 2 or more: raise it, or leave "
            "--pipeline-schedule out."
        )
    if schedule == "1f1b" and virtual:
        raise UsageError(
            f"--pipeline-schedule 1f1b has one stage a process, and {virtual[0]} makes several: take "
            f"--pipeline-schedule interleaved, or leave {virtual[0]} out."
        )
    if schedule in ("interleaved", "interleaved-zero-bubble") and not virtual:
        raise UsageError(
            f"--pipeline-schedule {schedule} needs virtual stages: give --num-layers-per-virtual-pipeline-stage or "
            "--num-virtual-stages-per-pipeline-rank, or take --pipeline-schedule 1f1b."
        )
    asked = layout.num_virtual_stages_per_pipeline_rank
    if schedule == "zbv" and asked not in (None, ZBV_STAGES):
        raise UsageError(
            f"--pipeline-schedule zbv has {ZBV_STAGES} stages a process, and --num-virtual-stages-per-pipeline-rank is "
            f"{asked}: give {ZBV_STAGES}, or leave it out."
        )
    if schedule == "zbv" and layout.num_layer_list is not None:
        raise UsageError(
            f"--pipeline-schedule zbv has {ZBV_STAGES} stages a process, for which --num-layer-list cannot speak: "
            "leave --num-layer-list out, or take --pipeline-schedule 1f1b."
        )
    if schedule in SPLIT_BACKWARD and sharding_strategy_of(layout) == "optim_grads_params":
        raise UsageError(
            f"--pipeline-schedule {schedule} splits the backward pass, which needs the weights to stay whole, and "
            "--data-parallel-sharding-strategy optim_grads_params drops them: take optim_grads, or the schedule "
            f"{'interleaved' if virtual else '1f1b'}."
        )
    again = "--recompute-granularity full" if cfg.kernels.recompute_granularity == "full" else None
    if schedule in SPLIT_BACKWARD and (again or cfg.kernels.compile):
        raise UsageError(
            f"--pipeline-schedule {schedule} splits the backward pass, and {again or '--compile'} would run a layer "
            f"once more for {'each of its weights' if again else 'each half'}: leave "
            f"{'it out, or recompute selectively' if again else 'it out'}, or take the schedule "
            f"{'interleaved' if virtual else '1f1b'}."
        )


def check_sequence_length(cfg: RunConfig) -> None:
    """The sequence can be dealt out: in 2 x CP pieces, of which causal ranks take one from each end, then over TP."""
    layout, seq_length = cfg.layout, cfg.batch.seq_length
    cp, tp = layout.context_parallel_size, layout.tensor_model_parallel_size
    if seq_length is None:
        return
    if cp > 1 and seq_length % (2 * cp):
        raise UsageError(
            f"--seq-length {seq_length} is not a multiple of 2 x --context-parallel-size {cp} = {2 * cp}: "
            f"{near(seq_length, 2 * cp)} would be."
        )
    if layout.sequence_parallel and seq_length % (cp * tp):
        multiple = math.lcm(2 * cp if cp > 1 else 1, cp * tp)
        parts = f"--tensor-model-parallel-size {tp}" + (f" x --context-parallel-size {cp} = {tp * cp}" * (cp > 1))
        raise UsageError(
            f"--seq-length {seq_length} is not a multiple of {parts}, as --sequence-parallel needs: "
            f"{near(seq_length, multiple)} would be."
        )


def check_data_parallel(cfg: RunConfig) -> None:
    """What data-parallel ranks share."""
    layout = cfg.layout
    strategy, copies = sharding_strategy_of(layout), layout.num_distributed_optimizer_instances
    if layout.use_distributed_optimizer and strategy == "no_shard":
        raise UsageError(
            "--use-distributed-optimizer shares the optimizer's state, and --data-parallel-sharding-strategy no_shard "
            "shares nothing: leave one of them out."
        )
    if copies > 1 and strategy == "no_shard":
        raise UsageError(
            f"--num-distributed-optimizer-instances {copies} is the number of copies of a sharded state, and nothing "
            "is sharded: add --use-distributed-optimizer or --data-parallel-sharding-strategy, or leave it out."
        )


def _virtual_flags(layout: Layout) -> list[str]:
    given = {
        "--num-layers-per-virtual-pipeline-stage": layout.num_layers_per_virtual_pipeline_stage,
        "--num-virtual-stages-per-pipeline-rank": layout.num_virtual_stages_per_pipeline_rank,
    }
    return [flag for flag, value in given.items() if value is not None]


LAYOUT_RULES: tuple[Callable[[RunConfig], None], ...] = (
    check_tensor_parallel,
    check_pipeline_stages,
    check_virtual_stages,
    check_pipeline_schedule,
    check_sequence_length,
    check_context_parallel,
    check_data_parallel,
)
