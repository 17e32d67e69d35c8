"""What is left of gradients to sum after backward, and how often the run holds each of them: from the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from tessel.checkpoint.tiles import local_of
from tessel.layout.sharding import ParamRule
from tessel.layout.tiles import tile_of
from tessel.parallel.groups import Groups

# Gradients up to this size are summed together; larger ones alone, where they lie.
_BUCKET_ELEMENTS = 1 << 20


class PartialSums:
    """Sums the gradients that the table calls partial, once, after the last backward of a step.

    FSDP2 has summed over replicas by then; here only the local shards are, over

        tp            tensor-parallel ranks: each saw its own heads
        sequence      the same ranks, under sequence parallelism: each saw its own tokens
        kv_replicas   those of them that hold a copy of the same key/value heads
        etp           ranks that hold other features of the same experts
        tied_stages   the first and the last stage, of a tied embedding

    Bytes: an all-reduce of norms, biases and the like; with tied stages, one of this stage's part of the embedding.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rules: Mapping[str, ParamRule],
        groups: Groups,
        sequence_parallel: bool,
    ) -> None:
        self._work: list[tuple[ProcessGroup, list[nn.Parameter]]] = []
        by_group: dict[ProcessGroup, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                for group in _groups_of(rules[name], groups, sequence_parallel):
                    by_group.setdefault(group, []).append(parameter)
        # The tied copies last: they are whole in their own stage by then.
        self._work = sorted(by_group.items(), key=lambda entry: entry[0] is groups.tied)

    @torch.no_grad()
    def __call__(self) -> None:
        """Sum, in place. Every rank must call it."""
        for group, parameters in self._work:
            gradients = [local_of(_gradient(parameter)) for parameter in parameters]
            small = [gradient for gradient in gradients if gradient.numel() <= _BUCKET_ELEMENTS]
            for gradient in gradients:
                if gradient.numel() > _BUCKET_ELEMENTS:
                    distributed.all_reduce(gradient, group=group)
            _all_reduce_together(small, group)


def _groups_of(rule: ParamRule, groups: Groups, sequence_parallel: bool) -> Iterable[ProcessGroup]:
    axes = rule.partial_axes
    if groups.tp is not None and ("tp" in axes or ("sequence" in axes and sequence_parallel)):
        yield groups.tp
    if groups.kv_copies is not None and "kv_replicas" in axes:
        yield groups.kv_copies
    if groups.etp is not None and "etp" in axes:
        yield groups.etp
    if groups.tied is not None and "tied_stages" in axes:
        yield groups.tied


def _gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter that nothing reached has a gradient of zero; its peers wait for it all the same."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _all_reduce_together(tensors: list[Tensor], group: ProcessGroup) -> None:
    if not any(tensor.numel() for tensor in tensors):
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def num_copies(rule: ParamRule, groups: Groups) -> int:
    """How many processes hold the same elements of a parameter as this one, itself included.

    A norm over the run counts each element once: the sum over processes of squares / copies.
    """
    mesh = groups.expert_replicas if rule.is_expert else groups.replicas
    repeated = mesh.size(0) if mesh.ndim == 2 else 1
    tied = 2 if groups.tied_copies and "tied_stages" in rule.partial_axes else 1
    return tile_of(rule, groups.topology, groups.place).copies * repeated * tied
