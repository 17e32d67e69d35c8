"""Pipeline parallelism: micro-batches through the stages of a model, of which this process holds one or more.

The schedules are torch.distributed.pipelining's (`tessel.layout.schedules` describes them). Between two
neighbouring stages a micro-batch sends B x S x E elements of the computation's dtype forward and as many
back, from each tensor-parallel rank; under sequence parallelism each of these sends its part, B x S / tp x E.
Beside that, four bytes a boundary go each way when a shape is first seen. Stages on one process pass tensors on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessel.config.layout import Layout
from tessel.data.loader import MicroBatch
from tessel.errors import UsageError
from tessel.layout.asked import schedule_of
from tessel.layout.schedules import taken_near, takes
from tessel.layout.stages import Stages
from tessel.model.transformer import Transformer
from tessel.parallel.apply import release_gathered
from tessel.parallel.groups import Groups
from tessel.parallel.runner import Localize, whole
from tessel.parallel.schedule import Schedule, Stage

# Shapes whose schedules are kept: a run has few (training, evaluation, the last batches of a set), a ramp one after
# another.
_MAX_SCHEDULES = 8


class _Shape(NamedTuple):
    """What a schedule is made for; pipelines have static shapes."""

    micro_batch_size: int
    seq_length: int  # local, under context parallelism
    num_micro_batches: int
    with_backward: bool


class PipelineRunner:
    """Runs micro-batches through a pipeline; a `Runner`.

    `chunks` are this rank's parts of the model, `stages.of_rank` of its pipeline rank, made by `keep_stage` and
    whatever else parallelises or wraps them, FSDP2 last. FSDP2 sums gradients over replicas once a step.
    Every rank of the pipeline calls `train` and `evaluate` alike, with whole micro-batches, which `localize` cuts.
    `compute_dtype` is that of the hidden states between stages.
    """

    def __init__(
        self,
        chunks: Sequence[Transformer],
        stages: Stages,
        groups: Groups,
        layout: Layout,
        localize: Localize = whole,
        *,
        compute_dtype: torch.dtype,
    ) -> None:
        assert groups.pp is not None, "a pipeline has two ranks or more"
        self._chunks = list(chunks)
        self._own = stages.of_rank(groups.place.pp)
        assert len(self._own) == len(self._chunks), "one chunk for each stage of this rank"
        self._stages = stages
        self._group = groups.pp
        self._device = groups.device
        self._num_sequence_parts = groups.topology.tp if layout.sequence_parallel else 1
        self._schedule_name = schedule_of(layout)
        self._localize = localize
        self._compute_dtype = compute_dtype
        self._schedules: OrderedDict[_Shape, Schedule] = OrderedDict()
        self._losses: list[Tensor | None] = []

    def train(self, batches: Sequence[MicroBatch], weights_BS: Sequence[Tensor], z_loss_coeff: float = 0.0) -> Tensor:
        """See `Runner`.

        Raises:
            UsageError: the schedule cannot run so many micro-batches; names the numbers near it that it can.
        """
        pp, number = self._stages.pp, len(batches)
        if not takes(self._schedule_name, pp, number):
            near = " or ".join(str(n) for n in taken_near(self._schedule_name, pp, number))
            raise UsageError(
                f"--pipeline-schedule {self._schedule_name} on --pipeline-model-parallel-size {pp} cannot run {number} "
                f"micro-batches in equal rounds: change --global-batch-size so that there are {near} on each replica."
            )
        return self._run(batches, weights_BS, z_loss_coeff, with_backward=True)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], weights_BS: Sequence[Tensor]) -> Tensor:
        """See `Runner`. Any number of micro-batches will do."""
        pieces = [
            self._run(batches[piece], weights_BS[piece], 0.0, with_backward=False)
            for piece in self._pieces(len(batches))
        ]
        for chunk in self._chunks:
            release_gathered(chunk)
        return torch.cat(pieces).double()  # of a stage without the head these are zeros, in fp32

    def _pieces(self, number: int) -> Iterator[slice]:
        """Numbers of micro-batches that the schedule takes: whole rounds, then the rest."""
        whole_rounds = number
        if not takes(self._schedule_name, self._stages.pp, number):
            whole_rounds -= number % self._stages.pp
        yield slice(0, whole_rounds)
        if whole_rounds < number:
            yield slice(whole_rounds, number)

    def _run(
        self, batches: Sequence[MicroBatch], weights_BS: Sequence[Tensor], z_loss_coeff: float, with_backward: bool
    ) -> Tensor:
        """This rank's loss terms, [micro-batches, terms]."""
        local = [self._localize(*pair) for pair in zip(batches, weights_BS, strict=True)]
        shapes = {batch.tokens_BS.shape for batch, _ in local}
        if len(shapes) != 1:
            raise ValueError(f"micro-batches of one step must have one shape, and these have {sorted(shapes)}")
        size, length = shapes.pop()
        shape = _Shape(size, length, len(local), with_backward)
        self._losses = [None] * len(local)
        inputs, keywords = self._arguments(local, z_loss_coeff)
        self._schedule(shape).run(inputs, **keywords)
        losses, self._losses = self._losses, []
        if not self._has_head:
            return torch.zeros(len(local), 2 if z_loss_coeff else 1, device=self._device)
        return torch.stack([loss for loss in losses if loss is not None])

    @property
    def _has_head(self) -> bool:
        return self._own[-1].is_last

    def _arguments(
        self, local: Sequence[tuple[MicroBatch, Tensor]], z_loss_coeff: float
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """(what the first stage takes, what every stage takes by keyword), of all micro-batches along dim 0."""
        batches = [batch for batch, _ in local]
        inputs = [torch.cat([batch.tokens_BS for batch in batches])] if self._own[0].is_first else []
        keywords: dict[str, Any] = {}
        positions = [batch.rope_positions_BS for batch in batches]
        if positions[0] is None and self._num_sequence_parts > 1:
            # From its part of the hidden states a stage could not tell how long the sequence is.
            length = batches[0].tokens_BS.shape[1]
            positions = [torch.arange(length, device=self._device)[None]] * len(batches)
        for name, tensors in (
            ("positions_BS", positions),
            ("segments_BS", [batch.segments_BS for batch in batches]),
            ("labels_BS", [batch.labels_BS for batch in batches] if self._has_head else []),
            ("weights_BS", [weights for _, weights in local] if self._has_head else []),
        ):
            present = [tensor for tensor in tensors if tensor is not None]
            if present:
                keywords[name] = torch.cat(present)
        if self._has_head:
            keywords["z_loss_coeff"] = z_loss_coeff
        return inputs, keywords

    def _schedule(self, shape: _Shape) -> Schedule:
        if shape not in self._schedules:
            self._schedules[shape] = self._make(shape)
            if len(self._schedules) > _MAX_SCHEDULES:
                self._schedules.popitem(last=False)
        self._schedules.move_to_end(shape)
        return self._schedules[shape]

    def _make(self, shape: _Shape) -> Schedule:
        stages = []
        for chunk, own in zip(self._chunks, self._own, strict=True):
            tokens = torch.empty(shape.micro_batch_size, shape.seq_length, dtype=torch.int64, device="meta")
            hidden = torch.empty(
                shape.micro_batch_size,
                shape.seq_length // self._num_sequence_parts,
                chunk.config.hidden_size,
                dtype=self._compute_dtype,
                device="meta",
                requires_grad=True,
            )
            receives, sends = tokens if own.is_first else hidden, hidden
            num_stages = len(self._stages.stages)
            stages.append(Stage(chunk, own.index, num_stages, self._device, self._group, receives, sends))
        return Schedule(self._schedule_name, stages, shape.num_micro_batches, self._keep_loss, shape.with_backward)

    def _keep_loss(self, terms: Tensor, number: Tensor) -> Tensor:
        """What backward starts from, of what the last stage returned for micro-batch `number`."""
        self._losses[int(number)] = terms.detach().reshape(-1)
        return terms.sum()
