"""The static rules of a layout: each broken in turn, with its remedy."""

from __future__ import annotations

import pytest

from tessel.config.layout import SHARDING_STRATEGIES, Layout
from tessel.config.layout_rules import any_of, near, sharding_strategy_of, whole_numbers
from tessel.config.validate import validate
from tessel.errors import UsageError
from tests.config.test_validate import read

PP = "pipeline_model_parallel_size"
TP = "tensor_model_parallel_size"
CP = "context_parallel_size"
STRATEGY = "data_parallel_sharding_strategy"

BROKEN = {
    # Tensor parallelism.
    "sequence_parallel": "--tensor-model-parallel-size is 1: raise it to 2 or more, or leave --sequence-parallel out.",
    # Stages.
    "num_layer_list=1,1": "--num-layer-list deals layers out to pipeline stages, and --pipeline-model-parallel-size is",
    "decoder_first_pipeline_num_layers=1": "raise it to 2 or more, or leave --decoder-first-pipeline-num-layers out.",
    f"{PP}=2 num_layer_list=1;1": "--num-layer-list is '1;1': it must be whole numbers apart by commas",
    f"{PP}=2 num_layer_list=3,-1": "--num-layer-list is '3,-1': it must be whole numbers apart by commas",
    f"{PP}=2 noop_layers=last": "--noop-layers is 'last': it must be whole numbers apart by commas",
    f"{PP}=2 num_layer_list=1,2,1": "has 3 entries: it must have one for each of --pipeline-model-parallel-size 2",
    f"{PP}=2 num_layer_list=3,1 decoder_last_pipeline_num_layers=1": "what --decoder-last-pipeline-num-layers says, to",
    f"{PP}=2 num_layer_list=3,1 num_layers_per_virtual_pipeline_stage=1": "leave out one of --num-layer-list and --num",
    # Virtual stages.
    "num_virtual_stages_per_pipeline_rank=2": "--pipeline-model-parallel-size is 1: raise it to 2 or more, or leave -",
    f"{PP}=2 num_virtual_stages_per_pipeline_rank=2 num_layers_per_virtual_pipeline_stage=1": "keep one of them.",
    f"{PP}=2 num_layers_per_virtual_pipeline_stage=1 decoder_last_pipeline_num_layers=1": "use --num-virtual-stages",
    # Schedules.
    "pipeline_schedule=1f1b": "--pipeline-schedule 1f1b needs --pipeline-model-parallel-size 2 or more: raise it",
    f"{PP}=2 pipeline_schedule=1f1b num_virtual_stages_per_pipeline_rank=2": "take --pipeline-schedule interleaved, or",
    f"{PP}=2 pipeline_schedule=interleaved": "needs virtual stages: give --num-layers-per-virtual-pipeline-stage or",
    f"{PP}=2 pipeline_schedule=interleaved-zero-bubble": "--pipeline-schedule interleaved-zero-bubble needs virtual",
    f"{PP}=2 pipeline_schedule=zbv num_virtual_stages_per_pipeline_rank=3": "is 3: give 2, or leave it out.",
    f"{PP}=2 pipeline_schedule=zbv num_layer_list=1,3": "leave --num-layer-list out, or take --pipeline-schedule 1f1b.",
    f"{PP}=2 pipeline_schedule=zbv {STRATEGY}=optim_grads_params": "take optim_grads, or the schedule 1f1b.",
    f"{PP}=2 pipeline_schedule=interleaved-zero-bubble num_virtual_stages_per_pipeline_rank=2 "
    f"{STRATEGY}=optim_grads_params": "take optim_grads, or the schedule interleaved.",
    f"{PP}=2 pipeline_schedule=zbv recompute_granularity=full recompute_method=uniform recompute_num_layers=1":
    "for each of its weights: leave it out, or recompute selectively, or take the schedule 1f1b.",
    f"{PP}=2 pipeline_schedule=zbv compile": "once more for each half: leave it out, or take the schedule 1f1b.",
    # The sequence, of 16 tokens.
    f"{CP}=3": "--seq-length 16 is not a multiple of 2 x --context-parallel-size 3 = 6: 12 or 18 would be.",
    f"{CP}=16": "--seq-length 16 is not a multiple of 2 x --context-parallel-size 16 = 32: 32 would be.",
    f"{TP}=3 sequence_parallel": "--seq-length 16 is not a multiple of --tensor-model-parallel-size 3, as --sequence-p",
    f"{TP}=3 sequence_parallel {CP}=2": "--tensor-model-parallel-size 3 x --context-parallel-size 2 = 6, as --sequence-"
    "parallel needs: 12 or 24 would be.",
    # Data parallelism.
    f"use_distributed_optimizer {STRATEGY}=no_shard": "no_shard shares nothing: leave one of them out.",
    "num_distributed_optimizer_instances=2": "nothing is sharded: add --use-distributed-optimizer or",
}  # fmt: skip


@pytest.mark.parametrize("changes", BROKEN)
def test_a_broken_rule_names_the_field_its_value_and_the_remedy(changes: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(read(changes))
    message = str(caught.value)
    assert BROKEN[changes] in message
    assert message.endswith(".") and message.count(". ") <= 1


@pytest.mark.parametrize(
    "changes",
    [
        f"{TP}=2 sequence_parallel tp_comm_overlap",
        f"{TP}=2 tp_comm_overlap",
        f"{PP}=4 num_layer_list=6,8,8,6",
        f"{PP}=2 num_layers_per_virtual_pipeline_stage=1 pipeline_schedule=interleaved",
        f"{PP}=2 num_virtual_stages_per_pipeline_rank=2 pipeline_schedule=interleaved-zero-bubble noop_layers=0,3",
        f"{PP}=2 num_virtual_stages_per_pipeline_rank=2 decoder_first_pipeline_num_layers=2",
        f"{PP}=2 pipeline_schedule=zbv {STRATEGY}=optim_grads",
        f"{PP}=2 pipeline_schedule=1f1b {STRATEGY}=optim_grads_params",
        f"{CP}=4 {TP}=4 sequence_parallel",
        "use_distributed_optimizer num_distributed_optimizer_instances=2",
        f"use_distributed_optimizer {STRATEGY}=optim_grads_params",
    ],
)
def test_layouts_that_hold_together_are_allowed(changes: str) -> None:
    validate(read(changes))


def test_what_data_parallel_ranks_share() -> None:
    assert sharding_strategy_of(Layout()) == "no_shard"
    assert sharding_strategy_of(Layout(use_distributed_optimizer=True)) == "optim"
    for strategy in SHARDING_STRATEGIES:
        assert sharding_strategy_of(Layout(data_parallel_sharding_strategy=strategy)) == strategy


def test_lists_and_words() -> None:
    assert whole_numbers("--x", None) is None
    assert whole_numbers("--x", "6, 8,8,0") == (6, 8, 8, 0)
    assert [any_of([1]), any_of([1, 2]), any_of([1, 2, 4])] == ["1", "1 or 2", "1, 2 or 4"]
    assert [near(9, 8), near(7, 8)] == ["8 or 16", "8"]
