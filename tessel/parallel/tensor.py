"""Tensor and sequence parallelism: each rank holds part of every layer, by the sharding table.

Between the regions where ranks differ, attention and MLP, all tensor-parallel ranks of a replica hold the
same activations; under sequence parallelism each holds the same contiguous part of every sequence, so that norms,
dropout and residual sums are shared out too (Megatron-LM, arXiv 1909.08053; sequence parallelism, arXiv 2205.05198).

=================== ============================= =============================
boundary            tensor parallel               with sequence parallelism
=================== ============================= =============================
embedding, leaving  all-reduce; -                 reduce-scatter; all-gather
attention, entering -; all-reduce                 all-gather; reduce-scatter
attention, leaving  all-reduce; -                 reduce-scatter; all-gather
MLP, entering       -; all-reduce                 all-gather; reduce-scatter
MLP, leaving        all-reduce; -                 reduce-scatter; all-gather
head, entering      -; all-reduce                 all-gather; reduce-scatter
loss                all-gather of 8 bytes a token the same
=================== ============================= =============================

(forward; backward.) Query, key and value enter together, as do gate and up: one collective, not three and
two. An all-reduce of b bytes over n ranks sends 2 (n-1)/n b from each, an all-gather or reduce-scatter of the
whole b half of that, so a rank sends the same either way, for every micro-batch of B sequences of S tokens:

    (4 x layers + 2) x 2 (n-1)/n x B S E x bytes of an element, and 8 (n-1) B S for the loss

Entered activations are kept for backward, not gathered again. Recomputed layers send their forward's twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tessel.layout.sharding import rule_of
from tessel.layout.tiles import Tile, tile_of
from tessel.model.attention import Attention, AttentionFn, Visibility
from tessel.model.config import ModelConfig
from tessel.model.layers import MLP, Linear, project
from tessel.model.lora import Adapter
from tessel.model.transformer import Decoder, Layer, Transformer
from tessel.parallel.collectives import copy_to, gather_from, reduce_from, scatter_to
from tessel.parallel.groups import Groups
from tessel.parallel.overlap import FusedProducts
from tessel.parallel.vocabulary import RankVocabulary, VocabularyEmbedding
from tessel.runtime.random import own_stream


@dataclass(frozen=True)
class Boundary:
    """How activations enter the region where tensor-parallel ranks differ, and leave it.

    Outside it they are whole on every rank, or with `sequence_parallel` cut along `dim`. `products`: what gathers
    or scatters them while it multiplies.
    """

    group: ProcessGroup
    sequence_parallel: bool
    dim: int = 1
    products: FusedProducts | None = None

    def enter(self, x: Tensor) -> Tensor:
        """From what ranks share to what each works on: the whole."""
        return gather_from(x, self.group, self.dim) if self.sequence_parallel else copy_to(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """From each rank's contribution to the sum."""
        return scatter_to(x, self.group, self.dim) if self.sequence_parallel else reduce_from(x, self.group)

    def project(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        """`enter` and `layers.project`; of weights with nothing beside them, the first product with its gather."""
        weights = [linear.weight for linear in linears]
        sizes = x.shape[-1], sum(len(weight) for weight in weights)
        if self.products is None or not _are_alone(linears) or not self.products.takes(*sizes):
            return project(self.enter(x), *linears)
        pairs = zip(self.products.gathered(x, weights), linears, strict=True)
        return tuple(y if linear.bias is None else y + linear.bias for y, linear in pairs)

    def leave_from(self, linear: Linear, x: Tensor) -> Tensor:
        """`leave` with what `linear` makes of x, without its bias."""
        if self.products is None or not _are_alone([linear]) or not self.products.takes(*linear.weight.shape):
            return self.leave(linear.with_adapter(x, None))
        return self.products.scattered(x, linear.weight)

    def enter_after(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """`enter` as a forward hook, on a module's output."""
        return self.enter(output)


class RowLinear(Linear):
    """A linear map whose input features are dealt out: the ranks' products are summed, then the bias is added once."""

    def __init__(self, linear: Linear, boundary: Boundary) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.lora, self.nf4 = linear.weight, linear.bias, linear.lora, linear.nf4
        self.boundary = boundary
        if isinstance(self.lora, Adapter):
            self.lora.sum_over_parts = lambda squares: reduce_from(squares, boundary.group)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., this rank's in_features] -> [..., out_features]."""
        y = self.boundary.leave_from(self, x)
        return y if self.bias is None else y + self.bias


def _are_alone(linears: Sequence[Linear]) -> bool:
    """Whether nothing is learned beside the weights, and they are held as numbers."""
    return all(linear.lora is None and linear.nf4 is None for linear in linears)


def apply_tensor_parallel(
    model: Transformer,
    config: ModelConfig,
    groups: Groups,
    sequence_parallel: bool,
    products: FusedProducts | None = None,
) -> None:
    """Give `model`, or a pipeline stage of it, this rank's tiles and the boundaries, in place.

    `products`: with sequence parallelism, what multiplies and gathers or scatters at once.
    Weights may be on the meta device or real. Experts stay as they are, and so does a layer's `mlp` that
    is not an `MLP`: it gets the tokens of this rank. Nothing is done where the degree is 1.

    Raises:
        UsageError: a degree does not divide what it cuts.
    """
    if groups.tp is None:
        return
    rules = {name: rule_of(name, config) for name, _ in model.named_parameters()}
    tiles = {name: tile_of(rule, groups.topology, groups.place) for name, rule in rules.items() if not rule.is_expert}
    cut_parameters(model, tiles)

    boundary = Boundary(groups.tp, sequence_parallel, products=products)
    for module in list(model.modules()):
        if isinstance(module, Layer):
            parallelize_attention(module.self_attn, boundary)
            if isinstance(module.mlp, MLP):
                parallelize_mlp(module.mlp, boundary)
    _parallelize_vocabulary(model, tiles, boundary)
    if "model.norm.weight" in tiles:
        model.model.norm.register_forward_hook(boundary.enter_after)
    _separate_dropout(model.model, groups.tp.rank(), sequence_parallel)


def parallelize_attention(attention: Attention, boundary: Boundary) -> None:
    """The boundaries of attention, whose projections hold this rank's heads."""
    attention.project = boundary.project
    attention.o_proj = RowLinear(attention.o_proj, boundary)  # type: ignore[assignment]


def parallelize_mlp(mlp: MLP, boundary: Boundary) -> None:
    """The boundaries of an MLP, whose projections hold this rank's features."""
    mlp.project = boundary.project
    mlp.down_proj = RowLinear(mlp.down_proj, boundary)  # type: ignore[assignment]


def _parallelize_vocabulary(model: Transformer, tiles: Mapping[str, Tile], boundary: Boundary) -> None:
    """The embedding and the head, as far as this stage has them; both have the same rows."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tiles:
            part = RankVocabulary.of(tiles[name], boundary.group)
            model.vocabulary = part
            if name == "model.embed_tokens.weight":
                embedding = VocabularyEmbedding(model.model.embed_tokens, part, boundary.leave)
                model.model.embed_tokens = embedding  # type: ignore[assignment]


def cut_parameters(model: nn.Module, tiles: Mapping[str, Tile]) -> None:
    """Cut whole parameters to their tiles, by name and in place; what is cut already stays. Padding is 0."""
    for name, tile in tiles.items():
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module.get_parameter(own_name)
        if tuple(parameter.shape) == tile.local_shape:
            continue
        local = parameter.detach().new_zeros(tile.local_shape)
        local[tile.local_index()] = parameter.detach()[tile.index()]
        setattr(module, own_name, nn.Parameter(local, parameter.requires_grad))


def _separate_dropout(decoder: Decoder, rank: int, sequence_parallel: bool) -> None:
    """Other masks on every rank where ranks differ, and the same where they are alike, as Megatron's two streams.

    Ranks differ in attention; with sequence parallelism everywhere between embedding and head.
    """
    attentions = [module for module in decoder.modules() if isinstance(module, Attention)]
    if sequence_parallel:
        if decoder.hidden_dropout or any(attention.dropout for attention in attentions):
            decoder.forward = _in_own_stream(decoder, rank)  # type: ignore[method-assign]
        return
    for attention in attentions:
        if attention.dropout:
            attention.kernel = _kernel_in_own_stream(attention.kernel, rank)


def _in_own_stream(decoder: Decoder, rank: int) -> Callable[..., Tensor]:
    forward = decoder.forward

    def forward_in_own_stream(tokens_BS: Tensor, *arguments: Any) -> Tensor:
        if not decoder.training:
            return forward(tokens_BS, *arguments)
        with own_stream(rank, tokens_BS.device):
            return forward(tokens_BS, *arguments)

    return forward_in_own_stream


def _kernel_in_own_stream(kernel: AttentionFn, rank: int) -> AttentionFn:
    # Generators are not for a compiled graph to swap.
    @torch.compiler.disable
    def kernel_in_own_stream(
        q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, visibility: Visibility, window: int | None, dropout: float
    ) -> Tensor:
        if not dropout:
            return kernel(q_BSHD, k_BKGD, v_BKGD, visibility, window, dropout)
        with own_stream(rank, q_BSHD.device):
            return kernel(q_BSHD, k_BKGD, v_BKGD, visibility, window, dropout)

    return kernel_in_own_stream
