"""torch.distributed.pipelining, with what tessel needs of its inner parts. All of these are in this file.

torch's runtime goes through a rank's list of actions. Added here: the 1F1B order for any number of
micro-batches, buffers and sends that last no longer than their micro-batch, weights that stay gathered
for the whole step, sums in FSDP2's reduction dtype after a split backward, and evaluation by every schedule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import P2POp, ProcessGroup, Work
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble
from torch.distributed.pipelining.schedules import (
    ScheduleInterleaved1F1B,
    _Action,
    _ComputationType,
    _PipelineContext,
    _PipelineScheduleRuntime,
)
from torch.distributed.pipelining.stage import _RecvInfo

from tessel.layout.schedules import one_forward_one_backward

# (the last stage's output, number of the micro-batch [1]) -> what backward starts from
LossFn = Callable[[Tensor, Tensor], Tensor]


class Stage(PipelineStage):
    """One stage of a pipeline for micro-batches of one shape.

    torch's allocates what it receives, in both directions, for all micro-batches of a step, and keeps what it
    sends to the end of the step. This one holds as much as its micro-batches in flight need.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        num_stages: int,
        device: torch.device,
        group: ProcessGroup,
        receives: Tensor,
        sends: Tensor,
    ) -> None:
        """`receives` and `sends` are like one micro-batch's input and output, without memory (on the meta device)."""
        super().__init__(module, index, num_stages, device, input_args=receives, output_args=sends, group=group)
        self._sent: dict[str, list[Work]] = {}

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        """Makes room for the input of a micro-batch, for as long as the forward needs it."""
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        """Makes room for the gradient of a micro-batch's output."""
        if self.has_backward and not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        """Sends at once; nothing is left to do."""
        return self._send("forward", super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        """Sends at once; nothing is left to do."""
        return self._send("backward", super().get_bwd_send_ops(bwd_chunk_id))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of a micro-batch, whose input from then on lives in its graph alone."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _release(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """Backward of a micro-batch, or its inputs' half; nothing but the other half then holds its graph."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        _release(self.grad_recv_info[bwd_chunk_id])
        if loss is not None:
            loss.detach_()

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The weights' half of a backward. FSDP2's hooks, which sum in its reduction dtype, do not see it."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        for module in self.submod.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for parameter in group.fsdp_params:
                        parameter.accumulate_unsharded_grad_if_needed()
                        parameter.to_accumulated_grad_if_needed()

    def drop(self, chunk_id: int) -> None:
        """Forget a forward that no backward will follow."""
        self.fwd_cache.pop(chunk_id, None)

    def finish(self) -> None:
        """Wait for the last sends of a step."""
        for works in self._sent.values():
            for work in works:
                work.wait()
        self._sent.clear()

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        self._without_memory(lambda: super(Stage, self)._setup_forward_recv_info(num_microbatches, has_backward))

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        self._without_memory(lambda: super(Stage, self)._setup_backward_recv_info(num_microbatches))

    def _without_memory(self, set_up: Callable[[], None]) -> None:
        device, self.device = self.device, torch.device("meta")
        try:
            set_up()
        finally:
            self.device = device

    def _allocate(self, infos: Sequence[_RecvInfo]) -> None:
        for info in infos:
            if info.tensor_meta is not None and not info.is_root_arg:
                info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=self.device)

    def _send(self, direction: str, ops: Sequence[P2POp]) -> list[P2POp]:
        # The one before has long been asked for: the receiver's list has its receive before this send.
        for work in self._sent.pop(direction, []):
            work.wait()
        works = [distributed.isend(op.tensor, op.peer, op.group) for op in ops]
        self._sent[direction] = [work for work in works if work is not None]
        return []


def _release(infos: Sequence[_RecvInfo]) -> None:
    for info in infos:
        info.buffer = None


class _OneForwardOneBackward(_PipelineScheduleRuntime):
    """1F1B. torch's own refuses fewer micro-batches than stages, and cannot evaluate under FSDP2."""

    def __init__(self, stages: list[Stage], n_microbatches: int, loss_fn: LossFn, scale_grads: bool) -> None:
        super().__init__(stages, n_microbatches, loss_fn=loss_fn, scale_grads=scale_grads)
        kinds = {"F": _ComputationType.FORWARD, "B": _ComputationType.FULL_BACKWARD}
        self.pipeline_order = {
            rank: [
                _Action(rank, kinds[work], number)
                for work, number in one_forward_one_backward(self.pp_group_size, rank, n_microbatches)
            ]
            for rank in range(self.pp_group_size)
        }
        self._prepare_schedule_with_comms(self.pipeline_order)


_SCHEDULES: dict[str, Callable[..., _PipelineScheduleRuntime]] = {
    "1f1b": _OneForwardOneBackward,
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved-zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Schedule:
    """One rank's part of a step: a number of micro-batches of one shape, forward and backward or forward alone."""

    def __init__(
        self, name: str, stages: Sequence[Stage], num_micro_batches: int, loss_fn: LossFn, with_backward: bool
    ) -> None:
        self._stages = {stage.stage_index: stage for stage in stages}
        self._num_micro_batches = num_micro_batches
        self._with_backward = with_backward
        self._runtime = _SCHEDULES[name](list(stages), num_micro_batches, loss_fn=loss_fn, scale_grads=False)
        custom = self._runtime.register_custom_function
        # FSDP2 gathers by itself, layer by layer, and once a step: weights between the halves of a backward stay.
        custom(_ComputationType.UNSHARD, self._use)
        custom(_ComputationType.RESHARD, _skip)
        if not with_backward:
            custom(_ComputationType.FULL_BACKWARD, self._drop)
            custom(_ComputationType.BACKWARD_INPUT, self._drop)
            custom(_ComputationType.BACKWARD_WEIGHT, _skip)
            custom(_ComputationType.REDUCE_GRAD, _skip)

    def run(self, inputs: Sequence[Tensor], **keywords: Any) -> None:
        """Run the step. Tensors are those of all micro-batches, one after the other along dim 0.

        `inputs` go to the first stage, `keywords` to all stages of this rank.
        """
        step = self._runtime.step if self._with_backward else self._runtime.eval
        noise = logging.getLogger(_PipelineScheduleRuntime.__module__)
        level = noise.level
        try:
            # On an error the runtime logs the whole schedule, before the error itself is shown.
            noise.setLevel(logging.CRITICAL)
            step(*inputs, target=torch.arange(self._num_micro_batches), return_outputs=False, **keywords)
            for stage in self._stages.values():
                stage.finish()
        finally:
            noise.setLevel(level)
            for stage in self._stages.values():
                stage.clear_runtime_states()

    def _use(self, action: _Action, ctx: _PipelineContext) -> None:
        self._runtime.unsharded_stages.add(action.stage_index)

    def _drop(self, action: _Action, ctx: _PipelineContext) -> None:
        assert action.microbatch_index is not None
        self._stages[action.stage_index].drop(action.microbatch_index)
        self._runtime.bwd_recv_ops.pop((action.stage_index, action.microbatch_index), None)


def _skip(action: _Action, ctx: _PipelineContext) -> None:
    """Leave an action of the schedule out."""
