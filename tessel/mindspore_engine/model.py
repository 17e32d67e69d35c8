"""The decoder by MindSpore: one pipeline stage of it, cut by tensor parallelism.

Arithmetic is that of `tessel.model`: norms, softmax and loss in fp32, products in the precision of training. What
MindSpore lacks on a CPU (embedding, cross-entropy, norm and attention as single operators) is written out.
Shape suffixes: B micro-batch, S sequence, E hidden size, H query heads, G key/value heads, D head_dim, V vocabulary
rows of this process, N = B x S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mindspore as ms
import torch
from mindspore import mint, nn, ops

from tessel.data.loader import MicroBatch
from tessel.layout.stages import Stage
from tessel.mindspore_engine.collectives import TensorParallel
from tessel.model.config import ModelConfig
from tessel.model.loss import default_chunk_tokens
from tessel.model.rope import Rope

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_NEVER = -1e30
"""Score of a key that a query must not see."""


class Inputs(NamedTuple):
    """A micro-batch as a stage takes it."""

    tokens_BS: ms.Tensor
    labels_BS: ms.Tensor
    weights_BS: ms.Tensor
    cos_BS1D: ms.Tensor
    sin_BS1D: ms.Tensor
    hidden_keys: Mapping[int | None, ms.Tensor]
    """By sliding window (None: without one), bool [1 or B, 1, S, S]: where a query does not see a key."""


class Decoder:
    """The layers of a stage, with the embedding on the first and norm, head and loss on the last.

    `weights` has what this process holds of the stage's parameters, fp32, by their names.
    """

    def __init__(
        self,
        config: ModelConfig,
        stage: Stage,
        weights: Mapping[str, ms.Parameter],
        parallel: TensorParallel,
        dtype: Any,
        recompute: bool,
    ) -> None:
        self.config, self.stage = config, stage
        self._weights, self._parallel, self._dtype = weights, parallel, dtype
        self._rope = Rope(config)
        self._on_cpu = ms.get_context("device_target") == "CPU"
        self._layers = [self._layer(number, recompute) for number in stage.layers]
        self._head_weight = HEAD if HEAD in weights else EMBEDDING
        self._loss = _Recomputed(self._token_losses, weights, (self._head_weight,)) if stage.is_last else None

    def inputs(self, batch: MicroBatch, weights_BS: torch.Tensor) -> Inputs:
        """A micro-batch and the weights of its tokens as this stage takes them."""
        positions_BS = batch.rope_positions_BS
        if positions_BS is None:
            positions_BS = torch.arange(batch.tokens_BS.shape[1])[None]
        cos_BS1D, sin_BS1D = self._rope(positions_BS, torch.float32)
        windows = {self.config.window(layer) for layer in self.stage.layers}
        return Inputs(
            _tensor(batch.tokens_BS),
            _tensor(batch.labels_BS),
            _tensor(weights_BS),
            _tensor(cos_BS1D).astype(self._dtype),
            _tensor(sin_BS1D).astype(self._dtype),
            {window: _tensor(_hidden_keys(batch, window)) for window in windows},
        )

    def activations(self, inputs: Inputs) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of what stages hand on: [B, S, E], under sequence parallelism of a part of the sequence."""
        size, length = inputs.tokens_BS.shape
        return (size, length // self._parallel.num_sequence_parts, self.config.hidden_size), self._dtype

    def __call__(self, inputs: Inputs, x_BSE: ms.Tensor | None = None) -> ms.Tensor:
        """The activations for the next stage; on the last one the sum of weights x nll, a scalar in fp32.

        `x_BSE` is what the stage before handed on; None on the first.
        """
        x_BSE = self._through_layers(inputs, x_BSE)
        if self._loss is None:
            return x_BSE
        x_BSE = self._parallel.enter(self._norm(FINAL_NORM, x_BSE))
        return self._weighted_loss(x_BSE.reshape(-1, x_BSE.shape[-1]), inputs)

    def logits(self, inputs: Inputs) -> ms.Tensor:
        """[B, S, V] of a whole model, fp32."""
        x_BSE = self._norm(FINAL_NORM, self._through_layers(inputs, None))
        return self._product(x_BSE, self._head_weight).astype(ms.float32)

    def _through_layers(self, inputs: Inputs, x_BSE: ms.Tensor | None) -> ms.Tensor:
        if x_BSE is None:
            x_BSE = self._embed(inputs.tokens_BS)
        for number, layer in zip(self.stage.layers, self._layers, strict=True):
            hidden_keys = inputs.hidden_keys[self.config.window(number)]
            x_BSE = layer(x_BSE, inputs.cos_BS1D, inputs.sin_BS1D, hidden_keys)
        return x_BSE

    def _layer(self, number: int, recompute: bool) -> Callable[..., ms.Tensor]:
        prefix = f"model.layers.{number}."

        def layer(x_BSE: ms.Tensor, cos_BS1D: ms.Tensor, sin_BS1D: ms.Tensor, hidden_keys: ms.Tensor) -> ms.Tensor:
            normed = self._norm(prefix + "input_layernorm.weight", x_BSE)
            x_BSE = x_BSE + self._attention(prefix + "self_attn.", normed, cos_BS1D, sin_BS1D, hidden_keys)
            normed = self._norm(prefix + "post_attention_layernorm.weight", x_BSE)
            return x_BSE + self._mlp(prefix + "mlp.", normed)

        if not recompute:
            return layer
        return _Recomputed(layer, self._weights, [name for name in self._weights if name.startswith(prefix)])

    def _embed(self, tokens_BS: ms.Tensor) -> ms.Tensor:
        weight_VE = self._weights[EMBEDDING]
        if self._parallel.size == 1:
            return ops.gather(weight_VE, tokens_BS, 0).astype(self._dtype)
        columns_BS, is_here_BS = self._columns(tokens_BS, weight_VE.shape[0])
        x_BSE = ops.gather(weight_VE, columns_BS, 0) * is_here_BS.reshape(*is_here_BS.shape, 1)
        return self._parallel.leave(x_BSE.astype(self._dtype))

    def _columns(self, ids: ms.Tensor, num_rows: int) -> tuple[ms.Tensor, ms.Tensor]:
        """(rows of ids in this process's part of the vocabulary, whether they are there: 1.0 or 0.0)."""
        own = ids - self._parallel.index * num_rows
        is_here = ops.logical_and(own >= 0, own < num_rows)
        return mint.where(is_here, own, mint.zeros(own.shape, dtype=own.dtype)), is_here.astype(ms.float32)

    def _norm(self, name: str, x: ms.Tensor) -> ms.Tensor:
        wide = x.astype(ms.float32)
        normed = wide * mint.rsqrt(mint.mean(wide * wide, dim=-1, keepdim=True) + self.config.rms_norm_eps)
        return (normed * self._weights[name]).astype(self._dtype)

    def _product(self, x: ms.Tensor, weight: str, bias: str = "") -> ms.Tensor:
        """x W^T + b over the last dim."""
        weight_OI = self._weights[weight].astype(self._dtype)
        y = mint.matmul(x.reshape(-1, x.shape[-1]), ops.transpose(weight_OI, (1, 0)))
        if bias in self._weights:
            y = y + self._weights[bias].astype(self._dtype)
        return y.reshape(*x.shape[:-1], weight_OI.shape[0])

    def _row_product(self, x_BSI: ms.Tensor, module: str) -> ms.Tensor:
        """A row-cut product: summed over the processes, and the bias added once."""
        y_BSE = self._parallel.leave(self._product(x_BSI, module + ".weight"))
        bias = self._weights.get(module + ".bias")
        return y_BSE if bias is None else y_BSE + bias.astype(self._dtype)

    def _mlp(self, prefix: str, x_BSE: ms.Tensor) -> ms.Tensor:
        x_BSE = self._parallel.enter(x_BSE)
        gate = self._product(x_BSE, prefix + "gate_proj.weight", prefix + "gate_proj.bias")
        up = self._product(x_BSE, prefix + "up_proj.weight", prefix + "up_proj.bias")
        return self._row_product(mint.nn.functional.silu(gate) * up, prefix + "down_proj")

    def _attention(
        self, prefix: str, x_BSE: ms.Tensor, cos_BS1D: ms.Tensor, sin_BS1D: ms.Tensor, hidden_keys: ms.Tensor
    ) -> ms.Tensor:
        x_BSE = self._parallel.enter(x_BSE)
        q_BSHD, k_BSGD, v_BSGD = (self._heads(prefix + name, x_BSE) for name in ("q", "k", "v"))
        if self.config.qk_norm:
            q_BSHD = self._norm(prefix + "q_norm.weight", q_BSHD)
            k_BSGD = self._norm(prefix + "k_norm.weight", k_BSGD)
        q_BSHD, k_BSGD = _rotated(q_BSHD, cos_BS1D, sin_BS1D), _rotated(k_BSGD, cos_BS1D, sin_BS1D)
        attend = _plain_attention if self._on_cpu else _fused_attention
        context_BSHD = attend(q_BSHD, k_BSGD, v_BSGD, hidden_keys)
        return self._row_product(context_BSHD.reshape(*x_BSE.shape[:2], -1), prefix + "o_proj")

    def _heads(self, name: str, x_BSE: ms.Tensor) -> ms.Tensor:
        y = self._product(x_BSE, f"{name}_proj.weight", f"{name}_proj.bias")
        return y.reshape(*x_BSE.shape[:2], -1, self.config.head_dim)

    def _weighted_loss(self, x_NE: ms.Tensor, inputs: Inputs) -> ms.Tensor:
        """The sum of weights x nll; of long sequences chunk by chunk, whose logits are computed again in backward."""
        assert self._loss is not None
        labels_N, weights_N = inputs.labels_BS.reshape(-1), inputs.weights_BS.reshape(-1)
        chunk = default_chunk_tokens(self.config.vocab_size, torch.device("cpu"))
        if len(labels_N) <= chunk:
            return self._token_losses(x_NE, labels_N, weights_N)
        total = ms.Tensor(0.0, ms.float32)
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            total = total + self._loss(x_NE[part], labels_N[part], weights_N[part])
        return total

    def _token_losses(self, x_NE: ms.Tensor, labels_N: ms.Tensor, weights_N: ms.Tensor) -> ms.Tensor:
        logits_NV = self._product(x_NE, self._head_weight).astype(ms.float32)
        num_rows = logits_NV.shape[1]
        num_real = min(num_rows, self.config.vocab_size - self._parallel.index * num_rows)
        logits_NV = logits_NV[:, :num_real]  # without the vocabulary's padding
        largest_N1 = self._parallel.largest(ops.stop_gradient(mint.amax(logits_NV, -1, True)))
        sum_N1 = self._parallel.total(mint.sum(mint.exp(logits_NV - largest_N1), dim=-1, keepdim=True))
        columns_N, is_here_N = self._columns(labels_N, num_rows)
        label_logits_N1 = ops.gather_elements(logits_NV, 1, columns_N.reshape(-1, 1)) * is_here_N.reshape(-1, 1)
        nll_N1 = mint.log(sum_N1) + largest_N1 - self._parallel.total(label_logits_N1)
        return mint.sum(nll_N1.reshape(-1) * weights_N)


class _Recomputed(nn.Cell):
    """A function whose activations are not kept but computed again in backward; it reads `names` of the weights."""

    def __init__(self, function: Callable[..., ms.Tensor], weights: Mapping[str, ms.Parameter], names: Any) -> None:
        super().__init__()
        self._function = _Registered(function, weights, names)

    def construct(self, *inputs: ms.Tensor) -> ms.Tensor:
        return ms.recompute(self._function, *inputs)


class _Registered(nn.Cell):
    """ms.recompute gives gradients to the parameters of its cell alone, not to those that a function closes over."""

    def __init__(self, function: Callable[..., ms.Tensor], weights: Mapping[str, ms.Parameter], names: Any) -> None:
        super().__init__()
        self._function = function
        self._read = ms.ParameterTuple([weights[name] for name in names])

    def construct(self, *inputs: ms.Tensor) -> ms.Tensor:
        return self._function(*inputs)


def _tensor(values: torch.Tensor) -> ms.Tensor:
    return ms.Tensor(values.contiguous().numpy())


def _hidden_keys(batch: MicroBatch, window: int | None) -> torch.Tensor:
    """bool [1 or B, 1, S, S]: keys after the query, out of its window, or of another document."""
    places_S = torch.arange(batch.tokens_BS.shape[1])
    distance_SS = places_S[:, None] - places_S
    hidden = (distance_SS < 0)[None, None]
    if window is not None:
        hidden = hidden | (distance_SS >= window)
    if batch.segments_BS is not None:
        hidden = hidden | (batch.segments_BS[:, None, :, None] != batch.segments_BS[:, None, None, :])
    return hidden


def _rotated(x_BSHD: ms.Tensor, cos_BS1D: ms.Tensor, sin_BS1D: ms.Tensor) -> ms.Tensor:
    first, second = mint.chunk(x_BSHD, 2, -1)
    return x_BSHD * cos_BS1D + mint.cat((-second, first), dim=-1) * sin_BS1D


def _plain_attention(q_BSHD: ms.Tensor, k_BSGD: ms.Tensor, v_BSGD: ms.Tensor, hidden_keys: ms.Tensor) -> ms.Tensor:
    """softmax(q k^T / sqrt(D)) v, [B, S, H, D]; H/G query heads in a row share a key/value head."""
    size, length, num_heads, head_dim = q_BSHD.shape
    num_kv_heads = k_BSGD.shape[2]

    def repeated_BHSD(x_BSGD: ms.Tensor) -> ms.Tensor:
        shape = (size, num_kv_heads, num_heads // num_kv_heads, length, head_dim)
        x_BG1SD = ops.transpose(x_BSGD, (0, 2, 1, 3)).reshape(size, num_kv_heads, 1, length, head_dim)
        return mint.broadcast_to(x_BG1SD, shape).reshape(size, num_heads, length, head_dim)

    q_BHSD, k_BHSD, v_BHSD = ops.transpose(q_BSHD, (0, 2, 1, 3)), repeated_BHSD(k_BSGD), repeated_BHSD(v_BSGD)
    scores_BHSS = mint.matmul(q_BHSD, ops.transpose(k_BHSD, (0, 1, 3, 2))).astype(ms.float32) / math.sqrt(head_dim)
    scores_BHSS = scores_BHSS + hidden_keys.astype(ms.float32) * _NEVER
    shares_BHSS = mint.nn.functional.softmax(scores_BHSS, dim=-1).astype(v_BSGD.dtype)
    return ops.transpose(mint.matmul(shares_BHSS, v_BHSD), (0, 2, 1, 3))


def _fused_attention(q_BSHD: ms.Tensor, k_BSGD: ms.Tensor, v_BSGD: ms.Tensor, hidden_keys: ms.Tensor) -> ms.Tensor:
    """The same by the operator of Ascend NPUs, which takes grouped heads as they are. Not yet run on hardware."""
    num_heads, head_dim = q_BSHD.shape[2:]
    return ops.flash_attention_score(
        q_BSHD,
        k_BSGD,
        v_BSGD,
        num_heads,
        attn_mask=hidden_keys,
        scalar_value=1 / math.sqrt(head_dim),
        input_layout="BSND",
    )
