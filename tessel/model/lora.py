"""Low-rank adapters beside linear maps; what they are is in `layout/adapters.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessel.layout.adapters import AdapterSpec, is_adapter
from tessel.model.layers import Linear


class Adapter(nn.Module):
    """scale * B A dropout(x), beside a linear map; without an A of its own, with that of `owner`."""

    def __init__(self, linear: Linear, spec: AdapterSpec, owner: Adapter | None) -> None:
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.A = nn.Parameter(torch.empty(spec.rank, in_features)) if owner is None else None
        self.B = nn.Parameter(torch.empty(out_features, spec.rank))
        self.scale, self.dropout = spec.scale, spec.dropout
        # In a tuple, so that the owner's parameter is not registered here as well.
        self._owner: tuple[Adapter, ...] = () if owner is None else (owner,)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., in_features] and what the linear map made of it, [..., out_features] -> their sum."""
        weight = self._owner[0].A if self.A is None else self.A
        assert weight is not None
        inner = F.linear(F.dropout(x, self.dropout, self.training), weight)
        return y + F.linear(inner, self.B) * self.scale


def attach_adapters(layers: nn.ModuleDict, spec: AdapterSpec) -> None:
    """Give the projections of `layers` that `spec` names an adapter each. Stacked experts have none."""
    for layer in layers.values():
        for block in list(layer.modules()):
            for projection in spec.targets:
                linear = getattr(block, projection, None)
                if isinstance(linear, Linear):
                    first = spec.owner(projection)
                    owner = None if first is None or first == projection else getattr(block, first).lora
                    linear.lora = Adapter(linear, spec, owner)


def freeze_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Let only adapters be trained, and hold all else in `dtype`, in place."""
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
