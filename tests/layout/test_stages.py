"""Every layer lies on one stage, in order, however layers are dealt out; and the orders of work on stages."""

from __future__ import annotations

import itertools

import pytest

from tessel.config.layout import Layout
from tessel.errors import UsageError
from tessel.layout.asked import stages_asked
from tessel.layout.schedules import one_forward_one_backward, taken_near, takes
from tessel.layout.stages import Stages, stages_of


def counts(stages: Stages) -> list[int]:
    return [len(stage.layers) for stage in stages.stages]


def check(stages: Stages, num_layers: int, pp: int, num_chunks: int) -> None:
    """Every layer once and in order; every rank as many stages; first and last are marked."""
    assert [layer for stage in stages.stages for layer in stage.layers] == list(range(num_layers))
    assert [stage.index for stage in stages.stages] == list(range(pp * num_chunks))
    own = [stages.of_rank(rank) for rank in range(pp)]
    assert all(len(stages_here) == num_chunks for stages_here in own)
    assert sorted(stage.index for here in own for stage in here) == list(range(pp * num_chunks))
    assert all(stage in own[stages.rank_of(stage.index)] for stage in stages.stages)
    assert [stage.is_first for stage in stages.stages] == [index == 0 for index in range(pp * num_chunks)]
    assert [stage.is_last for stage in stages.stages] == [
        index == pp * num_chunks - 1 for index in range(pp * num_chunks)
    ]


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("placement", ["loop", "v"])
def test_every_layer_once_in_order_or_refused(placement: str, pp: int) -> None:
    ends = [None, 0, 1, 2, 4]
    dealt = refused = 0
    for num_layers, num_chunks, first, last in itertools.product([1, 4, 8, 12, 24, 30], [1, 2, 3], ends, ends):
        for noops in ((), (num_layers,), (0, 3), (num_layers, num_layers + 1)):
            if any(place >= num_layers + len(noops) for place in noops):
                continue
            arguments = {"num_chunks": num_chunks, "first": first, "last": last, "noop_layers": noops}
            try:
                stages = stages_of(num_layers, pp, placement=placement, **arguments)  # type: ignore[arg-type]
            except UsageError:
                refused += 1
                continue
            dealt += 1
            check(stages, num_layers, pp, num_chunks)
            places = [0] * pp
            for stage in stages.stages:
                places[stages.rank_of(stage.index)] += len(stage.layers)
            for rank, count in ((0, first), (pp - 1, last)):
                assert count is None or count - len(noops) <= places[rank] <= count
    assert dealt and refused


def test_placements() -> None:
    loop, v = stages_of(8, 2, num_chunks=2), stages_of(8, 2, num_chunks=2, placement="v")
    assert [[stage.layers for stage in loop.of_rank(rank)] for rank in (0, 1)] == [[(0, 1), (4, 5)], [(2, 3), (6, 7)]]
    assert [[stage.layers for stage in v.of_rank(rank)] for rank in (0, 1)] == [[(0, 1), (6, 7)], [(2, 3), (4, 5)]]
    assert v.rank_of(0) == v.rank_of(3) == 0


def test_ends_and_lists() -> None:
    assert counts(stages_of(26, 4, layer_list=(6, 8, 8, 4))) == [6, 8, 8, 4]
    assert counts(stages_of(4, 4, layer_list=(1, 2, 1, 0))) == [1, 2, 1, 0]
    assert counts(stages_of(26, 4, first=5, last=7)) == [5, 7, 7, 7]
    assert counts(stages_of(26, 4, first=5)) == [5, 7, 7, 7]
    # A rank's own are shared by its stages; in a V the last stage is the first rank's.
    assert counts(stages_of(12, 3, num_chunks=2, first=4)) == [2, 2, 2, 2, 2, 2]
    assert counts(stages_of(12, 2, num_chunks=2, first=4)) == [2, 4, 2, 4]
    assert counts(stages_of(12, 2, num_chunks=2, first=4, placement="v")) == [2, 4, 4, 2]


def test_places_without_a_layer() -> None:
    """94 layers and two places, as MindSpeed has Qwen3-235B; 8 layers in 5 places a stage; places at both ends."""
    large = stages_of(94, 8, num_chunks=2, noop_layers=(94, 95))
    assert counts(large) == [6] * 15 + [4] and large.stages[15].layers == (90, 91, 92, 93)
    assert counts(stages_of(8, 2, noop_layers=(8, 9))) == [5, 3]
    assert [stage.layers for stage in stages_of(62, 16, noop_layers=(0, 63)).stages][::15] == [(0, 1, 2), (59, 60, 61)]


REFUSED = {
    (30, 4): "30 layers cannot be dealt out evenly to 4 pipeline stages: use --pipeline-model-parallel-size 1, 2, 3, "
    "5, 6, 10, 15, 30, add 2 places by --noop-layers, or say who has how many by --num-layer-list",
    (94, 8, "num_chunks=2"): "8 pipeline stages of 2 virtual ones each: use --pipeline-model-parallel-size 1, 47, add",
    (9, 3, "num_chunks=2"): "9 layers cannot be dealt out evenly to 3 pipeline stages of 2 virtual ones each: use few",
    (10, 3, "first=3"): "3 leaves 7 layers, which cannot be dealt out evenly to 2 pipeline stages: change them, add 1",
    (10, 4, "first=3 last=2"): "2 leave 5 layers, which cannot be dealt out evenly to 2 pipeline stages: change them",
    (10, 2, "first=3 last=4"): "do not fit 10 layers on --pipeline-model-parallel-size 2: change them so that they",
    (10, 1, "first=10 last=10"): "do not fit 10 layers on --pipeline-model-parallel-size 1",
    (10, 2, "first=12"): "--decoder-first-pipeline-num-layers 12 do not fit 10 layers",
    (10, 2, "first=3 num_chunks=2"): "3 layers cannot be dealt out evenly to 2 virtual stages: make it a multiple of",
    (10, 2, "layer_list=5,6"): "--num-layer-list 5,6 has 2 entries with 11 layers in all: it must have --pipeline",
    (10, 2, "layer_list=5,5 num_chunks=2"): "leave out one of --num-layer-list and --num-layers-per-virtual-pipeline",
    (10, 3, "layer_list=5,5"): "must have --pipeline-model-parallel-size 3 entries",
    (10, 2, "layer_list=12,-2"): "it must have --pipeline-model-parallel-size 2 entries",
    (10, 2, "noop_layers=10,12"): "--noop-layers 10,12: the places must differ and lie in 0..11 (10 layers and 2 pl",
    (10, 2, "noop_layers=3,3"): "--noop-layers 3,3: the places must differ",
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_what_would_do(case: tuple[int, int] | tuple[int, int, str]) -> None:
    arguments = {}
    for word in case[2].split() if len(case) > 2 else ():
        name, _, value = word.partition("=")
        numbers = tuple(int(n) for n in value.split(","))
        arguments[name] = numbers if name in ("layer_list", "noop_layers") else numbers[0]
    with pytest.raises(UsageError) as caught:
        stages_of(case[0], case[1], **arguments)  # type: ignore[arg-type]
    assert REFUSED[case] in str(caught.value)


def test_what_flags_ask_for() -> None:
    def asked(num_layers: int, pp: int, **flags: object) -> Stages:
        return stages_asked(Layout(pipeline_model_parallel_size=pp, **flags), num_layers)  # type: ignore[arg-type]

    assert counts(asked(28, 4, num_layer_list="6,8,8,6")) == [6, 8, 8, 6]
    assert counts(asked(8, 2, num_layers_per_virtual_pipeline_stage=2)) == [2, 2, 2, 2]
    assert counts(asked(8, 2, num_virtual_stages_per_pipeline_rank=4)) == [1] * 8
    assert counts(asked(94, 4, num_layers_per_virtual_pipeline_stage=12, noop_layers="94,95")) == [12] * 7 + [10]
    v = asked(8, 2, pipeline_schedule="zbv")
    assert (v.placement, v.num_chunks) == ("v", 2)


@pytest.mark.parametrize("pp", [1, 2, 4, 7])
def test_one_forward_one_backward(pp: int) -> None:
    """Any number of micro-batches, each forward before its backward, and no more between than 1F1B has."""
    for number, rank in itertools.product([1, 2, 3, 8, 9], range(pp)):
        order = one_forward_one_backward(pp, rank, number)
        assert sorted(order) == sorted((work, n) for work in "FB" for n in range(number))
        assert [n for work, n in order if work == "F"] == [n for work, n in order if work == "B"] == list(range(number))
        between = [sum(1 if work == "F" else -1 for work, _ in order[:end]) for end in range(len(order) + 1)]
        assert min(between) == 0 and max(between) == min(pp - rank, number)


def test_numbers_of_micro_batches() -> None:
    assert [n for n in range(12) if takes("1f1b", 4, n)] == list(range(1, 12))
    assert [n for n in range(18) if takes("interleaved", 4, n)] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 16]
    assert taken_near("interleaved", 4, 13) == [12, 15] and taken_near("interleaved-zero-bubble", 2, 5) == [4, 6]
    assert taken_near("interleaved", 4, 12) == [12] and taken_near("zbv", 4, 0) == [1]
