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
    (`--num-layer-list`); `first` and `last` how many the first and the last rank have, the others sharing
    the rest evenly (`--decoder-first/last-pipeline-num-layers`). A rank's own are shared evenly by its
    stages. `noop_layers` (MindSpeed's) are numbers, among num_layers + len(noop_layers) places, that hold no
    layer: places are dealt out, and the real layers are numbered on through the others. A stage may be left
    without a layer.

    Raises:
        UsageError: the layers cannot be dealt out so.
    """
    num_places = num_layers + len(noop_layers)
    _check_noops(noop_layers, num_places)
    if layer_list is not None:
        per_rank = _from_list(num_places, pp, num_chunks, layer_list)
    else:
        per_rank = _from_ends(num_places, pp, num_chunks, first, last)
    numbers = iter(range(num_layers))
    stages, place = [], 0
    for index in range(pp * num_chunks):
        stop = place + per_rank[rank_of_stage(index, pp, placement)] // num_chunks
        layers = tuple(next(numbers) for p in range(place, stop) if p not in noop_layers)
        stages.append(Stage(index, layers, index == 0, index == pp * num_chunks - 1))
        place = stop
    return Stages(pp, num_chunks, placement, tuple(stages))


def _check_noops(noop_layers: Sequence[int], num_places: int) -> None:
    if len(set(noop_layers)) != len(noop_layers) or any(not 0 <= place < num_places for place in noop_layers):
        raise UsageError(
            f"--noop-layers {','.join(map(str, noop_layers))}: the places must differ and lie in 0..{num_places - 1} "
            f"({num_places - len(noop_layers)} layers and {len(noop_layers)} places without one)."
        )


def _from_list(num_places: int, pp: int, num_chunks: int, layer_list: Sequence[int]) -> list[int]:
    """Places of each pipeline rank, as they are listed."""
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


def _from_ends(num_places: int, pp: int, num_chunks: int, first: int | None, last: int | None) -> list[int]:
    """Places of each pipeline rank, those between the ends having as many each; every one is a multiple of chunks."""
    given = {rank: count for rank, count in ((0, first), (pp - 1, last)) if count is not None}
    flags = [
        f"--decoder-{end}-pipeline-num-layers {count}"
        for end, count in (("first", first), ("last", last))
        if count is not None
    ]
    rest, others = num_places - sum(given.values()), pp - len(given)
    if given and (rest < 0 or (rest > 0 and not others) or pp < len(flags)):
        raise UsageError(
            f"{' and '.join(flags)} do not fit {num_places} layers on --pipeline-model-parallel-size {pp}: change them "
            "so that they leave the other stages what there is, or leave them out."
        )
    wrong = [count for count in given.values() if count < 0 or count % num_chunks]
    if wrong:
        raise UsageError(
            f"{' and '.join(flags)}: {wrong[0]} layers cannot be dealt out evenly to {num_chunks} virtual stages: make "
            f"it a multiple of {num_chunks}, or change the number of virtual stages."
        )
    if rest % (others * num_chunks or 1):
        what, change = f"{rest} layers", "change them"
        if flags:
            what = f"{' and '.join(flags)} leave{'s' if len(flags) == 1 else ''} {rest} layers, which"
        else:
            sizes = [str(n) for n in range(1, rest + 1) if rest % (n * num_chunks) == 0]
            change = f"use --pipeline-model-parallel-size {', '.join(sizes[:12])}" if sizes else "use fewer stages"
        ranks = f"{others} pipeline stages" + (f" of {num_chunks} virtual ones each" if num_chunks > 1 else "")
        by_list = "" if num_chunks > 1 else "--num-layer-list, "
        raise UsageError(
            f"{what} cannot be dealt out evenly to {ranks}: {change}, add {-rest % (others * num_chunks)} places by "
            f"--noop-layers, or say who has how many by {by_list}--decoder-first-pipeline-num-layers and "
            "--decoder-last-pipeline-num-layers."
        )
    share = rest // others if others else 0
    return [given.get(rank, share) for rank in range(pp)]
