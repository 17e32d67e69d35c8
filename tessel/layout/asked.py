"""What the flags of a layout ask for, in the terms of topology and stages."""

from __future__ import annotations

from tessel.config.layout import Layout
from tessel.config.layout_rules import ZBV_STAGES, any_of, whole_numbers
from tessel.errors import UsageError
from tessel.layout.stages import Stages, stages_of
from tessel.layout.topology import Degrees, Topology


def degrees_of(layout: Layout) -> Degrees:
    """The degrees that were asked for."""
    return Degrees(
        tp=layout.tensor_model_parallel_size,
        pp=layout.pipeline_model_parallel_size,
        cp=layout.context_parallel_size,
        ep=layout.expert_model_parallel_size,
        etp=layout.expert_tensor_parallel_size,
    )


def schedule_of(layout: Layout) -> str:
    """The order of work in the pipeline: --pipeline-schedule, or what the stages ask for."""
    if layout.pipeline_schedule is not None:
        return layout.pipeline_schedule
    virtual = (layout.num_layers_per_virtual_pipeline_stage, layout.num_virtual_stages_per_pipeline_rank)
    return "1f1b" if virtual == (None, None) else "interleaved"


def stages_asked(layout: Layout, num_layers: int) -> Stages:
    """The stages of a model of `num_layers` layers.

    Raises:
        UsageError: the layers cannot be dealt out so.
    """
    noops = whole_numbers("--noop-layers", layout.noop_layers) or ()
    return stages_of(
        num_layers,
        layout.pipeline_model_parallel_size,
        num_chunks=_num_chunks(layout, num_layers + len(noops)),
        layer_list=whole_numbers("--num-layer-list", layout.num_layer_list),
        first=layout.decoder_first_pipeline_num_layers,
        last=layout.decoder_last_pipeline_num_layers,
        noop_layers=noops,
        placement="v" if schedule_of(layout) == "zbv" else "loop",
    )


def num_shards(layout: Layout, topology: Topology, sharding_strategy: str) -> tuple[int, int]:
    """How many of the ranks that hold the same parameters share them: (dense, experts); the others repeat that.

    `sharding_strategy` is `sharding_strategy_of(layout)`. Context-parallel ranks hold the same parameters, too.
    """
    if sharding_strategy == "no_shard":
        return 1, 1
    copies = layout.num_distributed_optimizer_instances
    return topology.dp * topology.cp // copies, topology.edp // copies


def _num_chunks(layout: Layout, num_places: int) -> int:
    """Virtual stages of each pipeline rank."""
    if layout.num_virtual_stages_per_pipeline_rank is not None:
        return layout.num_virtual_stages_per_pipeline_rank
    per_stage, pp = layout.num_layers_per_virtual_pipeline_stage, layout.pipeline_model_parallel_size
    if per_stage is None:
        return ZBV_STAGES if layout.pipeline_schedule == "zbv" else 1
    per_rank, rest = divmod(num_places, pp)
    if rest or per_rank % per_stage:
        fits = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
        remedy = f"use {any_of(fits)}" if not rest else "add --noop-layers, or change the number of stages"
        raise UsageError(
            f"--num-layers-per-virtual-pipeline-stage {per_stage} does not divide the {num_places} layers over "
            f"--pipeline-model-parallel-size {pp} evenly: {remedy}."
        )
    chunks = per_rank // per_stage
    if layout.pipeline_schedule == "zbv" and chunks != ZBV_STAGES:
        raise UsageError(
            f"--pipeline-schedule zbv has {ZBV_STAGES} stages a process, and --num-layers-per-virtual-pipeline-stage "
            f"{per_stage} makes {chunks} of {per_rank} layers: leave it out."
        )
    return chunks
