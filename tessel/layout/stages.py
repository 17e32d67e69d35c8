"""Which layers lie on which pipeline stage, as pure arithmetic.

A stage is a run of consecutive layers; with `num_chunks` > 1 (virtual pipelining) a rank holds
several stages. Stages are numbered along the forward pass. Two placements:

    loop  stage s lies on rank s % PP            1F1B, interleaved 1F1B and interleaved zero bubble
    v     0, 1, ..., PP-1, PP-1, ..., 1, 0       V-shaped schedules (ZBV): first and last stage on rank 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tessel.errors import UsageError

Placement = Literal["loop", "v"]


@dataclass(frozen=True)
class Stage:
    """One stage: the real layers it runs, by their numbers in the checkpoint."""

    index: int
    layers: tuple[int, ...]
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Stages:
    """All stages of a model, and who holds them."""

    pp: int
    num_chunks: int
    placement: Placement
    stages: tuple[Stage, ...]

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that holds a stage."""
        return rank_of_stage(stage, self.pp, self.placement)

    def of_rank(self, pp_rank: int) -> list[Stage]:
        """The stages of a pipeline rank, in the order of the forward pass."""
        return [stage for stage in self.stages if self.rank_of(stage.index) == pp_rank]


def rank_of_stage(stage: int, pp: int, placement: Placement) -> int:
    """The pipeline rank that holds a stage."""
    lap, step = divmod(stage, pp)
    return pp - 1 - step if placement == "v" and lap % 2 else step


def stages_of(
    num_layers: int,
    pp: int = 1,
    *,
    num_chunks: int = 1,
    layer_list: Sequence[int] | None = None,
    first: int | None = None,
    last: int | None = None,
    noop_layers: Sequence[int] = (),
    placement: Placement = "loop",
) -> Stages:
    """Deal `num_layers` layers out to pp * num_chunks stages.

    Without more being said, every stage has as many. `layer_list` says how many each pipeline rank has
    (`--num-layer-list`); `first` and `last` how many the first and the last rank have, the others
    sharing the rest evenly (`--decoder-first/last-pipeline-num-layers`). `noop_layers` (MindSpeed's)
    are numbers, among num_layers + len(noop_layers) places, that hold no layer: places are dealt out, and the
    real layers are numbered on through the others.

    Raises:
        UsageError: the layers cannot be dealt out so.
    """
    num_places = num_layers + len(noop_layers)
    _check_noops(noop_layers, num_places)
    per_stage = _places_of_stages(num_places, pp, num_chunks, layer_list, first, last)
    number_of = {place: number for number, place in enumerate(p for p in range(num_places) if p not in noop_layers)}
    stages, place = [], 0
    for index, count in enumerate(per_stage):
        layers = tuple(number_of[p] for p in range(place, place + count) if p in number_of)
        stages.append(Stage(index, layers, index == 0, index == len(per_stage) - 1))
        place += count
    return Stages(pp, num_chunks, placement, tuple(stages))


def _check_noops(noop_layers: Sequence[int], num_places: int) -> None:
    if len(set(noop_layers)) != len(noop_layers) or any(not 0 <= place < num_places for place in noop_layers):
        raise UsageError(
            f"--noop-layers {','.join(map(str, noop_layers))}: the places must differ and lie in 0..{num_places - 1} "
            f"({num_places - len(noop_layers)} layers and {len(noop_layers)} places without one)."
        )


def _places_of_stages(
    num_places: int, pp: int, num_chunks: int, layer_list: Sequence[int] | None, first: int | None, last: int | None
) -> list[int]:
    if layer_list is not None:
        return _from_list(num_places, pp, num_chunks, layer_list)
    if first is None and last is None:
        return [_share(num_places, pp * num_chunks, num_places)] * (pp * num_chunks)
    ends = [n for n in (first, last) if n is not None]
    rest = num_places - sum(ends)
    if pp <= len(ends) - (1 if rest == 0 else 0) or rest < 0:
        raise UsageError(
            f"--decoder-first-pipeline-num-layers {first} and --decoder-last-pipeline-num-layers {last} do not fit "
            f"{num_places} layers on --pipeline-model-parallel-size {pp}: lower them, or leave them out."
        )
    between = pp - len(ends)
    middle = [_share(rest, between * num_chunks, num_places, first, last)] * between if between else []
    per_rank = [*([first] if first is not None else []), *middle, *([last] if last is not None else [])]
    if num_chunks == 1:
        return per_rank
    per_chunk = [_share(n, num_chunks, num_places, first, last) if n in ends and n is not None else n for n in per_rank]
    return per_chunk * num_chunks


def _from_list(num_places: int, pp: int, num_chunks: int, layer_list: Sequence[int]) -> list[int]:
    shown = ",".join(map(str, layer_list))
    if num_chunks > 1:
        raise UsageError(
            f"--num-layer-list {shown} does not go with virtual pipeline stages: leave out one of --num-layer-list and "
            "--num-layers-per-virtual-pipeline-stage."
        )
    if len(layer_list) != pp or sum(layer_list) != num_places or min(layer_list) < 0:
        raise UsageError(
            f"--num-layer-list {shown} has {len(layer_list)} entries with {sum(layer_list)} layers in all: it must "
            f"have --pipeline-model-parallel-size {pp} entries, and {num_places} layers in all."
        )
    return list(layer_list)


def _share(places: int, stages: int, num_places: int, first: int | None = None, last: int | None = None) -> int:
    if places % stages == 0:
        return places // stages
    ends = "" if first is None and last is None else " that the first and the last stage leave"
    divisors = [n for n in range(1, places + 1) if places % n == 0]
    raise UsageError(
        f"{places} layers{ends} cannot be dealt out evenly to {stages} pipeline stages: use a number of stages among "
        f"{divisors[:12]}, or say who has how many: --num-layer-list, --decoder-first-pipeline-num-layers, "
        "--decoder-last-pipeline-num-layers, or --noop-layers."
    )
