"""The decoder: embedding, layers, norm, head and loss, on one device.

A parameter has the name that it has in the Hugging Face checkpoint. Layers are a ModuleDict keyed
by their global number, so that a part of the model keeps the whole model's names.
Shape suffixes: B batch, S sequence, E hidden size, V vocabulary rows, N = B x S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tessel.config.run import Kernels as KernelOptions
from tessel.errors import UsageError
from tessel.model.attention import Attention, KeyValueCache, Visibility, run_lengths
from tessel.model.config import ModelConfig
from tessel.model.kernels import Kernels
from tessel.model.layers import MLP, Embedding, Linear, RMSNorm
from tessel.model.loss import VocabularyPart, chunked_linear_cross_entropy, chunked_nll
from tessel.model.rope import Rope


@dataclass(frozen=True)
class Recompute:
    """Which activations are computed again in backward instead of kept. Changes no number, dropout included.

    selective: inside attention, between rotary positions and output projection. full, uniform:
    every layer, `num_layers` in one unit, of which only the input is kept. full, block: each of the
    first `num_layers` layers.
    """

    granularity: Literal["full", "selective"]
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1

    @classmethod
    def from_options(cls, options: KernelOptions) -> Recompute | None:
        """From `--recompute-*`; None where nothing is recomputed.

        Raises:
            UsageError: full recomputation without a method, or a number of layers below 1.
        """
        granularity = options.recompute_granularity or ("selective" if options.recompute_activations else None)
        if granularity is None:
            return None
        if granularity == "selective":
            return cls("selective")
        if options.recompute_method is None:
            raise UsageError("--recompute-granularity full needs --recompute-method; give uniform or block.")
        num_layers = 1 if options.recompute_num_layers is None else options.recompute_num_layers
        if num_layers < 1:
            raise UsageError(f"--recompute-num-layers {num_layers} must be at least 1.")
        return cls("full", "block" if options.recompute_method == "block" else "uniform", num_layers)

    def units(self, num_layers: int) -> list[tuple[int, int]]:
        """The recomputed units as (first layer, layer after the last), counted from the first layer here."""
        if self.granularity == "selective":
            return []
        if self.method == "block":
            return [(layer, layer + 1) for layer in range(min(self.num_layers, num_layers))]
        return [(first, min(first + self.num_layers, num_layers)) for first in range(0, num_layers, self.num_layers)]


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        kernels: Kernels,
        attention_dropout: float,
        hidden_dropout: float,
        recompute_attention: bool,
    ) -> None:
        super().__init__()
        self.hidden_dropout = hidden_dropout
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, kernels.attention, attention_dropout, recompute_attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x_BSE: Tensor, rope: tuple[Tensor, Tensor], visibility: Visibility, cache: KeyValueCache | None = None
    ) -> Tensor:
        """[B, S, E] -> [B, S, E]."""
        branch_BSE = self.self_attn(self.input_layernorm(x_BSE), rope, visibility, cache)
        x_BSE = x_BSE + F.dropout(branch_BSE, self.hidden_dropout, self.training)
        branch_BSE = self.mlp(self.post_attention_layernorm(x_BSE))
        return x_BSE + F.dropout(branch_BSE, self.hidden_dropout, self.training)


class Decoder(nn.Module):
    """What the checkpoint calls `model`: all but the head.

    `is_first`: it begins with the embedding; `is_last`: it ends with the norm. A pipeline's stage is
    a part of it (see `model/stage.py`).
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        attention_dropout: float,
        hidden_dropout: float,
        recompute: Recompute | None,
    ) -> None:
        super().__init__()
        self.config, self.hidden_dropout, self.recompute = config, hidden_dropout, recompute
        self.is_first = self.is_last = True
        selective = recompute is not None and recompute.granularity == "selective"
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {
                str(layer): Layer(config, layer, kernels, attention_dropout, hidden_dropout, selective)
                for layer in range(config.num_hidden_layers)
            }
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None,
        segments_BS: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Hidden states after the last norm, [B, S, E].

        A part that is not the first takes the hidden states of the one before it in place of tokens; one
        that is not the last returns what comes before the norm.
        """
        if positions_BS is None:
            if cache is not None:
                raise ValueError("with a cache, positions_BS must say where the tokens stand")
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        x_BSE = tokens_BS
        if self.is_first:
            x_BSE = F.dropout(self.embed_tokens(tokens_BS), self.hidden_dropout, self.training)
        rope = self.rope(positions_BS, x_BSE.dtype)
        visibility = self._visibility(positions_BS, segments_BS, cache)
        layers = list(self.layers.values())
        units = self.recompute.units(len(layers)) if self.recompute and torch.is_grad_enabled() else []
        done = 0
        for first, last in units:
            x_BSE = checkpoint(_run, layers[first:last], x_BSE, rope, visibility, cache, use_reentrant=False)
            done = last
        x_BSE = _run(layers[done:], x_BSE, rope, visibility, cache)
        return self.norm(x_BSE) if self.is_last else x_BSE

    def _visibility(self, positions_BS: Tensor, segments_BS: Tensor | None, cache: KeyValueCache | None) -> Visibility:
        if cache is not None:
            return Visibility(segments_BS)
        # Reading the runs waits for the device, so only the CPU, where it pays most, goes by runs.
        by_run = segments_BS is not None and segments_BS.device.type == "cpu"
        visibility = Visibility(segments_BS, run_lengths(segments_BS) if by_run and segments_BS is not None else None)
        if visibility.run_lengths is None:
            length = positions_BS.shape[1]
            for window in {self.config.window(int(layer)) for layer in self.layers}:
                visibility.mask(length, length, window, positions_BS.device)
        return visibility


def _run(
    layers: Sequence[nn.Module],
    x_BSE: Tensor,
    rope: tuple[Tensor, Tensor],
    visibility: Visibility,
    cache: KeyValueCache | None,
) -> Tensor:
    for layer in layers:
        x_BSE = layer(x_BSE, rope, visibility, cache)
    return x_BSE


class Transformer(nn.Module):
    """A decoder with its head. Parameters are fp32 and uninitialised: load a checkpoint, or `initialize_`.

    A tied model has no `lm_head`. The batch is five [B, S] tensors: tokens, labels, weights,
    positions, segments.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels | None = None,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        recompute: Recompute | None = None,
        loss_chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.loss_chunk_tokens = config, loss_chunk_tokens
        self.model = Decoder(config, kernels or Kernels(), attention_dropout, hidden_dropout, recompute)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        # Set where the head and the embedding hold some rows of the vocabulary only.
        self.vocabulary: VocabularyPart | None = None

    @property
    def layers(self) -> nn.ModuleDict:
        """The layers by their global numbers."""
        return self.model.layers

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, E]: the embedding's own where they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
        *,
        labels_BS: Tensor | None = None,
        weights_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
        logits: Literal["all", "last"] = "all",
        z_loss_coeff: float = 0.0,
    ) -> Tensor:
        """What is returned depends on what is given.

        - labels and weights: sum(weights * nll), a scalar in fp32; with a z-loss, two terms whose sum is
          the loss (see `model/loss.py`). A label is the token that should follow; where the weight
          is 0 it may be anything. For fp16, put the loss scale into the weights.
        - labels alone: the nll of each token, fp32 [B, S], without gradients.
        - neither: logits [B, S, V], or [B, 1, V] with `logits="last"`, in the dtype of the weights.
        - whatever is given, by a part that is not the last: hidden states [B, S, E]. One that is not the first
          takes them in place of tokens; `positions_BS` then have to be given where S is cut.

        `positions_BS` are RoPE positions (0, 1, ... where not given; required with a cache).
        `segments_BS`, integers: a token sees the tokens up to itself that have its own number; None:
        all up to itself. With a cache, segments cover the cached and the new positions, and the new
        tokens are the last of them.
        """
        hidden_BSE: Tensor = self.model(tokens_BS, positions_BS, segments_BS, cache)
        if not self.model.is_last:
            return hidden_BSE
        if labels_BS is None:
            logits_BSV = F.linear(hidden_BSE if logits == "all" else hidden_BSE[:, -1:], self.head_weight)
            return logits_BSV if self.vocabulary is None else self.vocabulary.join(logits_BSV)
        hidden_NE, labels_N = hidden_BSE.flatten(0, 1), labels_BS.flatten()
        if weights_BS is None:
            nll_N = chunked_nll(hidden_NE, self.head_weight, labels_N, self.loss_chunk_tokens, self.vocabulary)
            return nll_N.view(labels_BS.shape)
        return chunked_linear_cross_entropy(
            hidden_NE,
            self.head_weight,
            labels_N,
            weights_BS.flatten(),
            self.loss_chunk_tokens,
            z_loss_coeff,
            self.vocabulary,
        )

    @torch.no_grad()
    def per_token_nll(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of each label, fp32 [B, S], chunked as the loss is; without gradients."""
        nll_BS: Tensor = self(tokens_BS, positions_BS, segments_BS, labels_BS=labels_BS)
        return nll_BS
