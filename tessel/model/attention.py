"""Attention with grouped queries: which positions see which, the kernels' reference, and the module.

Shape suffixes: B batch, S query positions, K key positions, H query heads, G key/value heads,
D head_dim, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessel.model.config import ModelConfig
from tessel.model.layers import Linear, Projection, RMSNorm, project
from tessel.model.recompute import recomputed
from tessel.model.rope import rotate

# Under this mean length, one masked call is faster than a call for each segment (docs/LOG.md).
_MIN_SEGMENT_TOKENS = 32


class KeyValueCache(Protocol):
    """What generation keeps of earlier positions."""

    def attend(self, layer: int, q_1NHD: Tensor, k_1NGD: Tensor, v_1NGD: Tensor, window: int | None) -> Tensor:
        """Keep a layer's new keys and values, and attend with what was kept of each text. [1, N, H, D]."""
        ...


@dataclass
class Visibility:
    """Who sees whom in one forward pass: causal, within equal segments, within a window.

    `segments_BK`: integers, over the cached and the new positions; None where all are one segment.
    Masks are built when first asked for and serve every layer. `run_lengths`: the segments as
    consecutive runs of the flattened batch, when attention may be done run by run.
    """

    segments_BK: Tensor | None = None
    run_lengths: tuple[int, ...] | None = None
    masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict)

    def mask(self, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
        """True where a query may look, [B or 1, 1, S, K]; None where plain causal attention is meant.

        Queries are the last of the keys. A single query that sees every key has None too.
        """
        if window is not None and window >= num_keys:
            window = None
        key = (num_queries, num_keys, window)
        if key not in self.masks:
            self.masks[key] = self._build(num_queries, num_keys, window, device)
        return self.masks[key]

    def _build(self, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
        if self.segments_BK is None and window is None and num_queries in (1, num_keys):
            return None
        keys_K = torch.arange(num_keys, device=device)
        queries_S1 = keys_K[num_keys - num_queries :, None]
        visible = keys_K <= queries_S1
        if window is not None:
            visible &= keys_K > queries_S1 - window
        visible_BSK = visible[None]
        if self.segments_BK is not None:
            queries_BS1 = self.segments_BK[:, num_keys - num_queries :, None]
            visible_BSK = visible_BSK & (queries_BS1 == self.segments_BK[:, None, :])
        return visible_BSK[:, None]


def run_lengths(segments_BS: Tensor) -> tuple[int, ...] | None:
    """Lengths of the runs of equal segments over the flattened batch; None where runs won't do.

    They won't if runs are so short that one masked call is faster, or if a segment's number comes
    back after another one, since its parts see each other.
    """
    starts_BS = torch.ones_like(segments_BS, dtype=torch.bool)
    starts_BS[:, 1:] = segments_BS[:, 1:] != segments_BS[:, :-1]
    starts = starts_BS.flatten().nonzero().flatten().tolist()
    if segments_BS.numel() < _MIN_SEGMENT_TOKENS * len(starts):
        return None
    if len(starts) != sum(len(row.unique()) for row in segments_BS):
        return None
    return tuple(stop - start for start, stop in zip(starts, [*starts[1:], segments_BS.numel()], strict=True))


# (queries [B,S,H,D], keys [B,K,G,D], values [B,K,G,D], visibility, window, dropout probability) -> [B,S,H,D]
AttentionFn = Callable[[Tensor, Tensor, Tensor, Visibility, int | None, float], Tensor]


def plain_attention(
    q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, visibility: Visibility, window: int | None, dropout: float
) -> Tensor:
    """The reference: softmax(q k^T / sqrt(D)) v written out, with the softmax in fp32."""
    num_queries, num_keys, repeats = q_BSHD.shape[1], k_BKGD.shape[1], q_BSHD.shape[2] // k_BKGD.shape[2]
    k_BKHD, v_BKHD = (x.repeat_interleave(repeats, dim=2) for x in (k_BKGD, v_BKGD))
    scores_BHSK = torch.einsum("bshd,bkhd->bhsk", q_BSHD, k_BKHD) * q_BSHD.shape[-1] ** -0.5
    mask = visibility.mask(num_queries, num_keys, window, q_BSHD.device)
    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BSHD.device).tril(num_keys - num_queries)
    weights_BHSK = scores_BHSK.float().masked_fill(~mask, float("-inf")).softmax(dim=-1).to(q_BSHD.dtype)
    return torch.einsum("bhsk,bkhd->bshd", F.dropout(weights_BHSK, dropout), v_BKHD)


def sdpa_attention(
    q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, visibility: Visibility, window: int | None, dropout: float
) -> Tensor:
    """torch's scaled_dot_product_attention, segment by segment where that is faster than a mask."""
    lengths = visibility.run_lengths
    if lengths is not None and (window is None or window >= max(lengths)):
        pieces = zip(*(x.flatten(0, 1).split(lengths) for x in (q_BSHD, k_BKGD, v_BKGD)), strict=True)
        outputs = [_sdpa(q[None], k[None], v[None], None, dropout)[0] for q, k, v in pieces]
        return torch.cat(outputs).view(q_BSHD.shape)
    mask = visibility.mask(q_BSHD.shape[1], k_BKGD.shape[1], window, q_BSHD.device)
    return _sdpa(q_BSHD, k_BKGD, v_BKGD, mask, dropout)


def _sdpa(q_BSHD: Tensor, k_BKGD: Tensor, v_BKGD: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    out_BHSD = F.scaled_dot_product_attention(
        q_BSHD.transpose(1, 2),
        k_BKGD.transpose(1, 2),
        v_BKGD.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and q_BSHD.shape[1] > 1,
        enable_gqa=q_BSHD.shape[2] != k_BKGD.shape[2],
    )
    return out_BHSD.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    The number of heads is read off the projections, so that a rank which holds some of them
    computes with these.
    """

    def __init__(self, config: ModelConfig, layer: int, kernel: AttentionFn, dropout: float) -> None:
        super().__init__()
        self.layer, self.kernel, self.dropout, self.recompute = layer, kernel, dropout, False
        self.project: Projection = project
        self.rotate = rotate
        self.head_dim, self.window = config.head_dim, config.window(layer)
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(hidden, heads * self.head_dim, config.attention_bias)
        self.k_proj = Linear(hidden, kv_heads * self.head_dim, config.attention_bias)
        self.v_proj = Linear(hidden, kv_heads * self.head_dim, config.attention_bias)
        self.o_proj = Linear(heads * self.head_dim, hidden, config.attention_output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x_BSE: Tensor,
        rope: tuple[Tensor, Tensor],
        visibility: Visibility,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[B, S, E] -> [B, S, E]; `rope` is (cos, sin), each [B or 1, S, 1, D]."""
        q_BSHD, k_BSGD, v_BKGD = (
            y.unflatten(-1, (-1, self.head_dim)) for y in self.project(x_BSE, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHD, k_BSGD = self.q_norm(q_BSHD), self.k_norm(k_BSGD)
        q_BSHD, k_BKGD = self.rotate(q_BSHD, *rope), self.rotate(k_BSGD, *rope)
        if cache is not None:
            cached_BSE: Tensor = self.o_proj(cache.attend(self.layer, q_BSHD, k_BKGD, v_BKGD, self.window).flatten(2))
            return cached_BSE
        dropout = self.dropout if self.training else 0.0
        arguments = (q_BSHD, k_BKGD, v_BKGD, visibility, self.window, dropout)
        out_BSHD = recomputed(self.kernel, *arguments) if self.recompute else self.kernel(*arguments)
        out_BSE: Tensor = self.o_proj(out_BSHD.flatten(2))
        return out_BSE
