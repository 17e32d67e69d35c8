"""What a model and a number of processes refuse of a layout, each with its remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tessel.config.run import RunConfig
from tessel.config.validate import validate
from tessel.errors import UsageError
from tessel.layout.asked import num_shards, schedule_of, stages_asked
from tessel.model.config import ModelConfig
from tessel.train.checks import check_layout, check_model_of_run
from tessel.train.source import Kind, Source
from tests.config.test_validate import read

# 12 attention heads, 2 key/value heads, MLP of 96, 6 layers; a vocabulary that nothing divides.
MODEL = ModelConfig(
    family="qwen2", vocab_size=307, hidden_size=96, intermediate_size=96, num_hidden_layers=6,
    num_attention_heads=12, num_key_value_heads=2, head_dim=8,
)  # fmt: skip
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"


def config(changes: str) -> RunConfig:
    return validate(read(changes))  # --micro-batch-size 2 --global-batch-size 8 --seq-length 16


BROKEN = {
    # Processes.
    (f"{TP}=2 {PP}=2", 6): "x --context-parallel-size 1 = 4 does not divide the number of processes 6. Start 4 or 8 pr",
    (f"{TP}=3", 8): "Degrees that fit 8 processes: products of 1, 2, 4, 8.",
    # Experts that are not there.
    (f"{EP}=2", 2): "--expert-model-parallel-size 2 shares experts, and this model has none: leave --expert-model-par",
    (f"{ETP}=2", 2): "--expert-tensor-parallel-size 2 shares experts, and this model has none: leave",
    # The model.
    (f"{TP}=8", 8): "--tensor-model-parallel-size 8 does not divide the 12 attention heads: use 1, 2 or 4.",
    (f"{TP}=5", 5): "--tensor-model-parallel-size 5 does not divide the 12 attention heads: use 1.",
    (f"{TP}=3", 6): "--tensor-model-parallel-size 3 does not divide the 2 key/value heads: use 1, 2 or 6.",
    (f"{PP}=4", 4): "6 layers cannot be dealt out evenly to 4 pipeline stages: use --pipeline-model-parallel-size 1, 2",
    (f"{PP}=2 num_layer_list=4,4", 2): "--num-layer-list 4,4 has 2 entries with 8 layers in all: it must have --pipel",
    (f"{PP}=2 num_layers_per_virtual_pipeline_stage=2", 2): "does not divide the 6 layers over --pipeline-model-parall"
    "el-size 2 evenly: use 1 or 3.",
    (f"{PP}=4 num_layers_per_virtual_pipeline_stage=1", 4): "evenly: add --noop-layers, or change the number of stages",
    (f"{PP}=2 num_layers_per_virtual_pipeline_stage=1 pipeline_schedule=zbv", 2): "makes 3 of 3 layers: leave it out.",
    # The batch.
    ("", 3): "--global-batch-size 8 is not a multiple of --micro-batch-size 2 x 3 data-parallel replicas = 6: 6 or 12",
    ("-global_batch_size", 2): "--global-batch-size 2 is not a multiple of --micro-batch-size 2 x 2 data-parallel repl"
    "icas = 4: 4 would be.",
    ("-train_iters train_samples=800 rampup_batch_size=4,2,60", 2): "must be multiples of --micro-batch-size 2 x 2 dat"
    "a-parallel replicas = 4; 4 or 8 and 4 would be.",
    (f"{PP}=2 num_virtual_stages_per_pipeline_rank=3 global_batch_size=10", 2): "--pipeline-schedule interleaved on --"
    "pipeline-model-parallel-size 2 cannot run 5 micro-batches in equal rounds, and a batch of 10 is so many on each "
    "of 1 data-parallel replicas: make it 8 or 12.",
    (f"{PP}=2 num_virtual_stages_per_pipeline_rank=3 global_batch_size=12 -train_iters train_samples=800 "
     "rampup_batch_size=10,2,60", 2): "cannot run 5 micro-batches in equal rounds, and a batch of 10",
    # Copies of a sharded state.
    ("use_distributed_optimizer num_distributed_optimizer_instances=3", 4): "does not divide the 4 data-parallel repli"
    "cas: use 1, 2 or 4.",
}  # fmt: skip


@pytest.mark.parametrize(("changes", "world_size"), BROKEN)
def test_what_does_not_fit_names_the_flag_and_the_values_that_do(changes: str, world_size: int) -> None:
    with pytest.raises(UsageError) as caught:
        check_layout(config(changes), MODEL, world_size)
    message = str(caught.value)
    assert BROKEN[changes, world_size] in message
    assert message.endswith(".") and message.count(". ") <= 2


@pytest.mark.parametrize(
    ("changes", "world_size", "words"),
    [
        ("", 1, "one copy on 1 process"),
        ("", 4, "DP4 on 4 processes"),
        (f"{TP}=4 sequence_parallel", 4, "TP4 on 4 processes"),  # two copies of each key/value head
        (f"{TP}=2 {PP}=2 {CP}=2", 8, "TP2 PP2 CP2 on 8 processes"),
        (f"{PP}=4 noop_layers=0,7", 4, "PP4 on 4 processes"),
        (f"{PP}=4 num_layer_list=1,2,2,1", 4, "PP4 on 4 processes"),
        (f"{PP}=2 num_layers_per_virtual_pipeline_stage=1", 2, "PP2 on 2 processes"),
        (f"{PP}=2 pipeline_schedule=zbv noop_layers=6,7", 2, "PP2 on 2 processes"),
        ("-train_iters train_samples=800 rampup_batch_size=4,4,60", 2, "DP2 on 2 processes"),
        ("use_distributed_optimizer num_distributed_optimizer_instances=2", 4, "DP4 on 4 processes"),
    ],
)
def test_what_fits_has_a_topology(changes: str, world_size: int, words: str) -> None:
    assert check_layout(config(changes), MODEL, world_size).describe() == words


def test_stages_schedule_and_shards_that_flags_ask_for() -> None:
    layout = config(f"{PP}=2 num_layers_per_virtual_pipeline_stage=1").layout
    assert schedule_of(layout) == "interleaved"
    assert [stage.layers for stage in stages_asked(layout, 6).of_rank(1)] == [(1,), (3,), (5,)]
    v_shaped = config(f"{PP}=2 pipeline_schedule=zbv").layout
    assert [stage.layers for stage in stages_asked(v_shaped, 8).of_rank(0)] == [(0, 1), (6, 7)]
    assert schedule_of(config(f"{PP}=2").layout) == "1f1b"
    sharded = config(f"use_distributed_optimizer num_distributed_optimizer_instances=2 {CP}=2")
    topology = check_layout(sharded, MODEL, 8)
    assert num_shards(sharded.layout, topology, "optim") == (4, 4)
    assert num_shards(sharded.layout, topology, "no_shard") == (1, 1)


def test_a_v_shape_refuses_tied_weights() -> None:
    flags = config(f"{PP}=2 pipeline_schedule=zbv noop_layers=6,7")
    check_layout(flags, MODEL, 2)
    with pytest.raises(UsageError, match="share their weights, which it would then hold twice: take --pipeline-sched"):
        check_layout(flags, replace(MODEL, tie_word_embeddings=True), 2)


MIXTURE = replace(
    MODEL, family="qwen3_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=10, num_key_value_heads=4
)
BROKEN_MIXTURE = {
    (f"{EP}=4", 4): "--expert-model-parallel-size 4 does not divide the 6 experts of the model: use 1 or 2.",
    (f"{TP}=2", 2): "A mixture of experts on --tensor-model-parallel-size 2 needs --sequence-parallel, so that",
    (f"{TP}=4 sequence_parallel", 4): "--expert-tensor-parallel-size 4 does not divide the 10 features inside each exp",
    (f"{ETP}=4", 4): "--expert-tensor-parallel-size 4 does not divide the 10 features inside each",
    (f"{EP}=2 {ETP}=2", 2): "--expert-model-parallel-size 2 x --expert-tensor-parallel-size 2 does not divide the 2 pr",
    (f"{EP}=4 use_distributed_optimizer num_distributed_optimizer_instances=2 global_batch_size=16", 8): "the 6",
    (f"{EP}=2 {ETP}=2 use_distributed_optimizer num_distributed_optimizer_instances=4", 4): "4 data-parallel replicas "
    "and 1 replicas of each expert: use 1.",
}  # fmt: skip


@pytest.mark.parametrize(("changes", "world_size"), BROKEN_MIXTURE)
def test_what_a_mixture_refuses(changes: str, world_size: int) -> None:
    with pytest.raises(UsageError) as caught:
        check_layout(config(changes), MIXTURE, world_size)
    assert BROKEN_MIXTURE[changes, world_size] in str(caught.value)


def test_what_a_mixture_takes() -> None:
    assert check_layout(config(f"{EP}=2 {ETP}=2"), MIXTURE, 4).describe() == "DP4 EP2 ETP2 on 4 processes"
    both = config(f"{TP}=2 sequence_parallel {EP}=2 {ETP}=1")
    assert check_layout(both, MIXTURE, 4).describe() == "TP2 DP2 EP2 ETP1 on 4 processes"


def test_without_experts_nothing_is_shared_twice() -> None:
    """Tensor-parallel processes are then no replicas of experts, whose gradients would have to be summed."""
    assert check_layout(config(f"{TP}=2"), MODEL, 2).edp == 1


def test_a_vocabulary_is_padded_but_leaves_no_process_without_rows() -> None:
    check_layout(config(f"{TP}=4"), replace(MODEL, vocab_size=7, num_key_value_heads=4), 4)
    with pytest.raises(UsageError, match="5 rows leaves the last of --tensor-model-parallel-size 6 processes without"):
        check_layout(config(f"{TP}=6"), replace(MODEL, vocab_size=5), 6)


def test_a_run_of_another_model_is_refused(tiny_hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    saved, other = tiny_hf_folder("llama"), tiny_hf_folder("llama", hidden_size=64)
    source = Source(Kind.RESUME, tmp_path, 1, saved)
    model = ModelConfig.from_folder(saved)

    def check(**flags: Any) -> None:
        changes = "-load " + " ".join(f"{name}={value}" if value is not True else name for name, value in flags.items())
        check_model_of_run(config(changes), source, model)

    with pytest.raises(UsageError, match=r"holds a run of another model \(model: hidden_size was 32 and is 64.*--over"):
        check(init_from_config=other)
    check(init_from_config=other, override=True)
    check(init_from_config=saved)
