"""Which layouts are found, what they are said to cost, and that what is found can be run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tessel.errors import UsageError
from tessel.layout.choice import Choice
from tessel.layout.cost import CostModel
from tessel.layout.memory import MemoryModel
from tessel.layout.rates import KNOWN, Rates, known_rates, likely_kind, rates_from
from tessel.layout.search import Cluster, Findings, Wanted, search, spread
from tessel.layout.sharding import rules
from tessel.layout.stages import stages_of
from tessel.layout.tiles import tile_of
from tessel.layout.topology import Topology
from tessel.model.catalog import known_model

GIB = 2**30


def find(name: str, num_devices: int, gib: int, **wanted: Any) -> Findings:
    model = MemoryModel(known_model(name))
    cluster = Cluster(num_devices, gib * GIB)
    return search(model, CostModel(model, KNOWN["H100"]), cluster, Wanted(**{"seq_length": 4096, **wanted}))


@pytest.mark.parametrize(
    ("name", "num_devices", "gib", "batch"),
    [
        ("Qwen2.5-7B", 8, 80, 64),
        ("Llama-3.1-405B", 1024, 80, 512),
        ("Qwen3-30B-A3B", 16, 64, 256),
        ("Qwen3-Coder-480B-A35B", 512, 64, 1024),
    ],
)
def test_what_is_found_can_be_run(name: str, num_devices: int, gib: int, batch: int) -> None:
    config = known_model(name)
    findings = find(name, num_devices, gib, global_batch_size=batch)
    assert len({found.choice for found in findings.fitting}) == len(findings.fitting) > 10
    for found in findings.fitting:
        choice, topology = found.choice, found.choice.topology
        assert topology.tp * topology.pp * topology.cp * topology.dp == num_devices
        assert topology.etp * topology.ep * topology.edp * topology.pp == num_devices
        assert choice.num_micro_batches * choice.micro_batch_size * topology.dp == batch
        assert 4096 % (topology.tp * topology.cp) == 0
        assert found.memory.peak <= gib * GIB * 0.92
        uneven = choice.layers if len(set(choice.layers)) > 1 else None
        stages = stages_of(config.num_hidden_layers, topology.pp, num_chunks=choice.num_chunks, layer_list=uneven)
        assert sum(len(stage.layers) for stage in stages.stages) == config.num_hidden_layers
        for rule in rules(config).values():
            tile_of(rule, topology, topology.place(num_devices - 1))
    ranked = [found.cost.step_s for found in findings.fitting]
    assert ranked[0] <= min(ranked) * 1.05


def test_a_small_model_is_only_repeated_and_a_large_one_cut() -> None:
    small = find("Qwen2.5-0.5B", 8, 80, global_batch_size=64).fitting[0].choice
    assert (small.topology.dp, small.recompute, small.sharding_strategy) == (8, "none", "optim")
    # Slow links between machines keep tensor parallelism inside one.
    large = find("Llama-3.1-405B", 1024, 80, global_batch_size=512, sharding_strategy="optim").fitting
    assert all(found.choice.topology.pp > 1 and found.choice.topology.tp <= 8 for found in large)


def test_given_degrees_are_kept() -> None:
    pins = {"tp": 4, "pp": 2, "micro_batch_size": 2, "sharding_strategy": "no_shard", "recompute": "full"}
    findings = find("Qwen2.5-7B", 8, 80, global_batch_size=64, **pins)
    for found in findings.fitting:
        choice = found.choice
        assert (choice.topology.tp, choice.topology.pp, choice.micro_batch_size) == (4, 2, 2)
        assert (choice.sharding_strategy, choice.recompute) == ("no_shard", "full")
    assert findings.fitting
    by_expert = find("Qwen3-30B-A3B", 16, 64, global_batch_size=256, ep=8, etp=2).fitting
    assert by_expert and {(f.choice.topology.ep, f.choice.topology.etp) for f in by_expert} == {(8, 2)}


def test_what_does_not_fit_says_how_much_is_lacking() -> None:
    findings = find("Qwen2.5-72B", 8, 24, global_batch_size=64)
    assert not findings.fitting and findings.least is not None
    choice, memory = findings.least
    assert choice.recompute == "full" and memory.peak > 24 * GIB
    # 16 bytes an element held for good, on 8 devices.
    assert memory.parameters + memory.gradients + memory.optimizer == pytest.approx(72_706_203_648 * 16 / 8, rel=0.01)
    assert find("Qwen2.5-7B", 8, 80, global_batch_size=3, tp=1, pp=1, cp=1).least is None


def test_a_long_sequence_is_shared_and_a_short_one_only_where_nothing_else_fits() -> None:
    long = find("Qwen2.5-7B", 8, 80, seq_length=131072, global_batch_size=8)
    assert long.fitting[0].choice.topology.cp > 1
    short = find("Qwen2.5-7B", 8, 80, global_batch_size=64)
    assert all(found.choice.topology.cp == 1 for found in short.fitting)


def test_layers_that_do_not_divide_go_to_the_middle() -> None:
    assert spread(28, 4) == (7, 7, 7, 7)
    assert spread(10, 4) == (2, 3, 3, 2)
    assert spread(126, 4) == (31, 32, 32, 31)
    assert sum(spread(94, 16)) == 94


def choice_of(topology: Topology, **changes: Any) -> Choice:
    base = Choice(topology, spread(28, topology.pp), 4096, 1, 64, sequence_parallel=topology.tp > 1)
    return replace(base, **changes)


def cost_of(choice: Choice, name: str = "Qwen2.5-7B", **rates: float) -> Any:
    model = MemoryModel(known_model(name))
    return CostModel(model, replace(KNOWN["H100"], **rates)).step(choice)


def test_bytes_of_each_axis_are_the_textbooks() -> None:
    hidden = 2 * 4096 * 3584  # bytes of a micro-batch's hidden states
    tp = cost_of(choice_of(Topology(2, tp=2))).sent
    assert tp["tp"] == 64 * (4 * 28 + 2) * 2 * hidden / 2 and tp["dp"] == tp["cp"] == tp["pp"] == tp["ep"] == 0
    cp = cost_of(choice_of(Topology(2, cp=2))).sent
    assert cp["cp"] == 64 * 28 * 3 * 2 * 2 * 2048 * 4 * 128
    pp = cost_of(choice_of(Topology(2, pp=2))).sent
    assert pp["pp"] == 64 * 2 * hidden
    weights = MemoryModel(known_model("Qwen2.5-7B")).weights(1)
    elements = 28 * weights.dense_layer + weights.embedding + weights.head
    dp = [cost_of(choice_of(Topology(4), sharding_strategy=s)).sent["dp"] for s in ("no_shard", "optim", "optim_grads")]
    assert dp[0] == 4 * elements * 2 * 3 / 4
    assert dp[1] == elements * 3 / 4 * (2 + 4)  # weights in bf16, gradients in fp32
    assert dp[2] == elements * 3 / 4 * (2 + 4 * 16)  # for each of 16 micro-batches
    two_copies = cost_of(choice_of(Topology(4), sharding_strategy="optim", copies=2)).sent["dp"]
    assert two_copies == elements / 2 * (2 + 4) + 4 * elements / 2
    routed = 2 * 4096 * 2048 * 8
    moe = replace(choice_of(Topology(4, ep=4)), layers=(48,))
    assert cost_of(moe, "Qwen3-30B-A3B").sent["ep"] == 16 * 48 * 4 * routed * 3 / 4


def test_bubbles_shrink_with_micro_batches_and_virtual_stages() -> None:
    four = choice_of(Topology(4, pp=4))
    assert cost_of(four).bubble == pytest.approx(3 / (64 + 3))
    assert cost_of(replace(four, num_chunks=7)).bubble == pytest.approx(3 / (64 * 7 + 3))
    assert cost_of(choice_of(Topology(4))).bubble == 0


def test_slower_links_and_recomputation_cost_time() -> None:
    across, inside = (replace(choice_of(Topology(tp, tp=tp)), layers=(36,)) for tp in (16, 8))
    slow, fast = (cost_of(across, "Qwen3-8B", network_gb_per_s=rate).step_s for rate in (5, 360))
    assert slow > 1.5 * fast
    slow, fast = (cost_of(inside, "Qwen3-8B", network_gb_per_s=rate).step_s for rate in (5, 360))
    assert slow == fast
    steps = [cost_of(choice_of(Topology(8), recompute=r)).step_s for r in ("none", "selective", "mlp", "full")]
    assert steps == sorted(steps) and len(set(steps)) == 4


def test_rates_by_name_by_memory_and_from_a_file() -> None:
    assert known_rates("h100") is KNOWN["H100"]
    assert [likely_kind(gib) for gib in (141, 80, 64, 40, 24)] == ["H200", "H100", "910B", "A100", "A100"]
    with pytest.raises(UsageError, match="--device-kind H1000 is not known; nearest: H100"):
        known_rates("H1000")
    with pytest.raises(UsageError, match="--device-kind TPU is not known; known: H100, H200, A100, 910B"):
        known_rates("TPU")
    measured = {"matmul_tflops": 1, "attention_tflops": 1, "memory_gb_per_s": 10, "node_gb_per_s": 5}
    given: dict[str, Any] = {**measured, "network_gb_per_s": 1}
    assert rates_from(given, "r.yaml") == Rates(1, 1, 10, 5, 1)
    with pytest.raises(UsageError, match="--rates r.yaml: network_gb_per_s missing; it holds matmul_tflops, "):
        rates_from(measured, "r.yaml")
    with pytest.raises(UsageError, match="--rates r.yaml: unknown speed"):
        rates_from({**given, "speed": 1}, "r.yaml")
    with pytest.raises(UsageError, match="network_gb_per_s is 'fast': it must be a number above 0"):
        rates_from({**given, "network_gb_per_s": "fast"}, "r.yaml")
