"""From stored tensors into a model's parameters, or an optimizer's state: each process reads what it holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tessel.checkpoint.stored import StoredTensor
from tessel.checkpoint.tiles import local_of, part_of, whole_tile
from tessel.layout.adapters import is_adapter
from tessel.layout.tiles import Tile
from tessel.model.lora import nf4_of
from tessel.runtime.log import progress
from tessel.runtime.watchdog import unlimited


def fill_model(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    device: torch.device | str = "cpu",
    tiles: Mapping[str, Tile] | None = None,
) -> None:
    """Give every parameter of `model` but adapters the value that is stored under its name, in its own dtype.

    What is held in four bits is read whole and quantised whole, on every process that holds a part of it. Those on
    the meta device are made on `device`, with the strides that they have there. `tiles`: see `huggingface.load_into`.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if not is_adapter(name)}
    in_four_bits = nf4_of(model)
    with (
        unlimited("reading weights"),
        progress("reading weights", sum(parameter.numel() for parameter in parameters.values())) as bar,
        torch.no_grad(),
    ):
        for name, parameter in parameters.items():
            tile = whole_tile(stored[name].shape) if tiles is None else tiles[name]
            if name in in_four_bits:
                part = part_of(parameter)
                in_four_bits[name].fill(part.values, stored[name].read, part.index())
            elif parameter.is_meta:
                value = torch.empty_like(parameter, device=device, requires_grad=False)
                fill(value, tile, stored[name])
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(value, parameter.requires_grad))
            else:
                fill(parameter, tile, stored[name])
            bar.advance(parameter.numel())


@torch.no_grad()
def fill_adapters(
    model: nn.Module,
    whole: Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    tiles: Mapping[str, Tile] | None = None,
) -> None:
    """Give every adapter of `model` what it holds of the `whole` tensors; those on the meta device are made."""
    for name, parameter in dict(model.named_parameters()).items():
        if not is_adapter(name):
            continue
        if parameter.is_meta:
            value = torch.empty_like(parameter, device=device, requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(value, parameter.requires_grad)
            setattr(model.get_submodule(owner), leaf, parameter)
        tile = whole_tile(tuple(whole[name].shape)) if tiles is None else tiles[name]
        part, local = part_of(parameter, tile), local_of(parameter)
        if part.values.shape != local.shape:
            local.zero_()
        if part.values.numel():
            part.values.copy_(whole[name][part.index()])


def fill(tensor: Tensor, tile: Tile, stored: StoredTensor) -> None:
    """Read what `tensor` holds of the parameter; the rest of it is padding, and zero."""
    part, local = part_of(tensor, tile), local_of(tensor)
    if part.values.shape != local.shape:
        local.zero_()
    if part.values.numel():
        part.values.copy_(stored.read(part.index()))
