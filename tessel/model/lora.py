"""Low-rank adapters beside linear maps; what they are is in `layout/adapters.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessel.layout.adapters import PROJECTIONS, AdapterSpec, is_adapter
from tessel.layout.tiles import Tile
from tessel.model.layers import Linear
from tessel.model.moe import EXPERT_PROJECTIONS, Experts, grouped_linear
from tessel.model.quantized import Nf4, Nf4Experts, Packing


class Adapter(nn.Module):
    """scale * B A dropout(x), beside a linear map; without an A of its own, with that of `owner`.

    With a `magnitude` m (DoRA), row i of W + scale B A is then given the length m[i]. `sum_over_parts`: adds up what
    ranks that hold other columns of W have. While `is_off`, the linear map is alone.
    """

    def __init__(self, linear: Linear, spec: AdapterSpec, owner: Adapter | None) -> None:
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.A = nn.Parameter(torch.empty(spec.rank, in_features)) if owner is None else None
        self.B = nn.Parameter(torch.empty(out_features, spec.rank))
        self.magnitude = nn.Parameter(torch.empty(out_features)) if spec.dora else None
        self.scale, self.dropout = spec.scale, spec.dropout
        self.sum_over_parts: Callable[[Tensor], Tensor] | None = None
        self.is_off = False
        # In a tuple, so that the owner's parameter is not registered here as well.
        self._owner: tuple[Adapter, ...] = () if owner is None else (owner,)

    def forward(self, x: Tensor, linear: Linear, bias: Tensor | None) -> Tensor:
        """x [..., in_features] -> [..., out_features]: what `linear` makes of it, and what is learned beside that."""
        if self.is_off:
            return linear.product(x, bias)
        dropped = F.dropout(x, self.dropout, self.training)
        if self.magnitude is None:
            return linear.product(x, bias) + self._learned(dropped)
        # The length before is taken for a constant (DoRA, arXiv 2402.09353, section 4.3).
        factor = self.magnitude / self.lengths(linear.dense_weight()).to(self.magnitude.dtype)
        product = linear.product(x)
        learned = self._learned(dropped)
        if self.dropout and self.training:
            y = product + (factor - 1) * linear.product(dropped) + factor * learned
        else:
            y = factor * (product + learned)
        return y if bias is None else y + bias

    def _learned(self, x: Tensor) -> Tensor:
        # The scale goes where there is least to multiply.
        return F.linear(F.linear(x, self._a()) * self.scale, self.B)

    def _a(self) -> Tensor:
        weight = self._owner[0].A if self.A is None else self.A
        assert weight is not None
        return weight

    @torch.no_grad()
    def lengths(self, weight: Tensor) -> Tensor:
        """Of the rows of `weight` + scale B A, fp32."""
        return self.norms(weight.float() + self.scale * (self.B.float() @ self._a().float()))

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        """Of the rows of `weight`, those columns included that other ranks hold."""
        squares = weight.float().square().sum(dim=1)
        return (squares if self.sum_over_parts is None else self.sum_over_parts(squares)).sqrt()


class ExpertAdapter(nn.Module):
    """An adapter for each of the experts of a stacked weight: A [X, r, in], B [X, out, r]; else as `Adapter`."""

    def __init__(self, weight_XOI: Tensor, spec: AdapterSpec, owner: ExpertAdapter | None) -> None:
        super().__init__()
        num_experts, out_features, in_features = weight_XOI.shape
        self.A = nn.Parameter(torch.empty(num_experts, spec.rank, in_features)) if owner is None else None
        self.B = nn.Parameter(torch.empty(num_experts, out_features, spec.rank))
        self.scale, self.dropout = spec.scale, spec.dropout
        self.is_off = False
        self._owner: tuple[ExpertAdapter, ...] = () if owner is None else (owner,)

    def forward(self, rows_NI: Tensor, y_NO: Tensor, counts_X: Tensor) -> Tensor:
        """Rows sorted by expert, what their experts' weights made of them, rows of each expert -> the sum, [N, O]."""
        if self.is_off:
            return y_NO
        a = self._owner[0].A if self.A is None else self.A
        assert a is not None
        inner_NR = grouped_linear(F.dropout(rows_NI, self.dropout, self.training), a, counts_X) * self.scale
        return y_NO + grouped_linear(inner_NR, self.B, counts_X)


def attach_adapters(layers: nn.ModuleDict, spec: AdapterSpec) -> None:
    """Give the projections of `layers` that `spec` names an adapter each, those of stacked experts too."""
    for layer in layers.values():
        experts = getattr(layer.get_submodule("mlp"), "experts", None)
        if isinstance(experts, Experts) and spec.experts:
            _attach_to_experts(experts, spec)
        for block in list(layer.modules()):
            for projection in spec.targets:
                linear = getattr(block, projection, None)
                if isinstance(linear, Linear):
                    first = spec.owner(projection)
                    owner = None if first is None or first == projection else getattr(block, first).lora
                    linear.lora = Adapter(linear, spec, owner)


def _attach_to_experts(experts: Experts, spec: AdapterSpec) -> None:
    held: dict[str, ExpertAdapter] = {}
    for projection in EXPERT_PROJECTIONS:
        first = spec.owner(projection)
        if first is not None:
            owner = None if first == projection else held[first]
            held[projection] = ExpertAdapter(experts.get_parameter(projection), spec, owner)
    experts.lora = nn.ModuleDict(held) if held else None


def hold_in_nf4(model: nn.Module, tiles: Mapping[str, Tile], dtype: torch.dtype, double: bool) -> None:
    """Hold the weights of all projections in four bits, in place and on the meta device; see `model/quantized.py`.

    `tiles`: which part of each weight is held; `dtype`: what is computed in; `double`: with 8-bit scales.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.rpartition(".")[2] in PROJECTIONS:
            tile = tiles[f"{name}.weight"]
            packing = Packing(tile.shape, tile.start, tile.size, dtype, double)
            packed = torch.empty(packing.packed_shape, dtype=dtype, device=module.weight.device)
            module.weight = nn.Parameter(packed, requires_grad=False)
            module.nf4 = Nf4(packing, module.weight.device)
        elif isinstance(module, Experts):
            module.nf4 = nn.ModuleDict(
                {
                    projection: _hold_experts(module, projection, tiles[f"{name}.{projection}"], dtype, double)
                    for projection in EXPERT_PROJECTIONS
                }
            )


def _hold_experts(experts: Experts, projection: str, tile: Tile, dtype: torch.dtype, double: bool) -> Nf4Experts:
    packing = Packing(tile.shape[1:], tile.start[1:], tile.size[1:], dtype, double)
    device = experts.get_parameter(projection).device
    packed = torch.empty((tile.size[0], *packing.packed_shape), dtype=dtype, device=device)
    setattr(experts, projection, nn.Parameter(packed, requires_grad=False))
    return Nf4Experts(packing, tile.start[0], tile.size[0], device)


def nf4_of(model: nn.Module) -> dict[str, Nf4 | Nf4Experts]:
    """What holds weights in four bits, by their names."""
    found: dict[str, Nf4 | Nf4Experts] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.nf4 is not None:
            found[f"{name}.weight"] = module.nf4
        elif isinstance(module, Experts) and module.nf4 is not None:
            found |= {f"{name}.{projection}": cast(Nf4Experts, nf4) for projection, nf4 in module.nf4.items()}
    return found


def freeze_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Let only adapters be trained, and hold all else in `dtype`, in place."""
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
