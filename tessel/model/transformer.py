"""The decoder: embedding, layers, norm, head and loss, on one device.

A parameter has the name that it has in the Hugging Face checkpoint. Layers are a ModuleDict keyed
by their global number, so that a part of the model keeps the whole model's names.
Shape suffixes: B batch, S sequence, E hidden size, V vocabulary rows, N = B x S.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessel.model.attention import Attention, KeyValueCache, Visibility, run_lengths
from tessel.model.balance import Balance, RouterOptions
from tessel.model.config import ModelConfig
from tessel.model.kernels import Kernels
from tessel.model.layers import MLP, Embedding, Linear, RMSNorm
from tessel.model.lora import attach_adapters
from tessel.model.loss import VocabularyPart, chunked_linear_cross_entropy, chunked_nll
from tessel.model.moe import MixtureOfExperts
from tessel.model.offload import Offload
from tessel.model.recompute import CORE_ATTENTION, LAYERNORM, MOE, Recompute, forgetting, recomputed
from tessel.model.recompute import MLP as WHOLE_MLP
from tessel.model.rope import Rope


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        kernels: Kernels,
        attention_dropout: float,
        hidden_dropout: float,
        balance: Balance,
        offload: Offload | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dropout, self.offload = hidden_dropout, offload
        self.recomputes: frozenset[str] = frozenset()
        self.swaps_attention = False
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, kernels.attention, attention_dropout)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config, layer, balance) if config.has_experts(layer) else MLP(config)

    def forward(
        self, x_BSE: Tensor, rope: tuple[Tensor, Tensor], visibility: Visibility, cache: KeyValueCache | None = None
    ) -> Tensor:
        """[B, S, E] -> [B, S, E]."""
        with self._swapped(x_BSE, rope, visibility):
            branch_BSE = self._branch(self.input_layernorm, x_BSE, self.self_attn, rope, visibility, cache)
        branch_BSE = F.dropout(branch_BSE, self.hidden_dropout, self.training)
        norm = self.post_attention_layernorm
        if norm.of_sum is None or LAYERNORM in self.recomputes:
            x_BSE = x_BSE + branch_BSE
            branch_BSE = self._branch(norm, x_BSE, self._mlp)
        else:
            x_BSE, normed_BSE = norm.of_sum(x_BSE, branch_BSE, norm.weight, norm.eps)
            branch_BSE = self._mlp(normed_BSE)
        return x_BSE + F.dropout(branch_BSE, self.hidden_dropout, self.training)

    def save_memory(self, recomputes: frozenset[str], swaps_attention: bool) -> None:
        """What of this layer is recomputed (see `Recompute.modules_of`); whether its attention is swapped out."""
        self.recomputes, self.swaps_attention = recomputes, swaps_attention
        self.self_attn.recompute = CORE_ATTENTION in recomputes
        self.mlp.save_memory(recomputes)

    def _branch(self, norm: nn.Module, x_BSE: Tensor, branch: Callable[..., Tensor], *rest: Any) -> Tensor:
        if LAYERNORM not in self.recomputes:
            return branch(norm(x_BSE), *rest)
        hooks = None if self.offload is None else self.offload.current
        return forgetting(norm, (x_BSE,), lambda y_BSE: branch(y_BSE, *rest), hooks)

    def _mlp(self, x_BSE: Tensor) -> Tensor:
        is_recomputed = (WHOLE_MLP if isinstance(self.mlp, MLP) else MOE) in self.recomputes
        out_BSE: Tensor = recomputed(self.mlp, x_BSE) if is_recomputed else self.mlp(x_BSE)
        return out_BSE

    def _swapped(
        self, x_BSE: Tensor, rope: tuple[Tensor, Tensor], visibility: Visibility
    ) -> AbstractContextManager[None]:
        if self.offload is None or not self.swaps_attention:
            return nullcontext()
        return self.offload.region(self, (*rope, *visibility.masks.values()), x_BSE.device)


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
        balance: Balance,
        offload: Offload | None = None,
    ) -> None:
        super().__init__()
        self.config, self.hidden_dropout = config, hidden_dropout
        self.recompute, self.offload = recompute or Recompute(None), offload
        self.is_first = self.is_last = True
        # False where the layers' attention makes its own masks, from the segments.
        self.builds_masks = True
        self.takes_runs = kernels.takes_runs
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {
                str(layer): Layer(config, layer, kernels, attention_dropout, hidden_dropout, balance, offload)
                for layer in range(config.num_hidden_layers)
            }
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config)
        self.save_memory()

    def save_memory(self) -> None:
        """Deal out over the layers here what is recomputed and swapped out; again, when layers are taken away."""
        num_layers = len(self.layers)
        for number, layer in enumerate(self.layers.values()):
            assert isinstance(layer, Layer)
            swaps = self.offload is not None and self.offload.attention
            is_whole = number < self.recompute.num_whole(num_layers)
            layer.save_memory(self.recompute.modules_of(number, num_layers), swaps and not is_whole)

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
        if self.offload is not None:
            self.offload.begin()
        for first, last, is_whole in self.recompute.parts(len(layers)):
            with self._offloaded(first, layers[first], rope, visibility, x_BSE.device):
                arguments = (layers[first:last], x_BSE, rope, visibility, cache)
                x_BSE = recomputed(_run, *arguments) if is_whole else _run(*arguments)
        return self.norm(x_BSE) if self.is_last else x_BSE

    def _offloaded(
        self,
        number: int,
        layer: nn.Module,
        rope: tuple[Tensor, Tensor],
        visibility: Visibility,
        device: torch.device,
    ) -> AbstractContextManager[None]:
        if self.offload is None or number >= self.offload.num_layers:
            return nullcontext()
        return self.offload.region(layer, (*rope, *visibility.masks.values()), device)

    def _visibility(self, positions_BS: Tensor, segments_BS: Tensor | None, cache: KeyValueCache | None) -> Visibility:
        if cache is not None or not self.builds_masks:
            return Visibility(segments_BS)
        # Reading the runs waits for the device: worth it on the CPU, and where a kernel takes their lengths.
        by_run = segments_BS is not None and (segments_BS.device.type == "cpu" or self.takes_runs)
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
        offload: Offload | None = None,
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        self.config, self.loss_chunk_tokens = config, loss_chunk_tokens
        self.balance = balance or Balance(config, RouterOptions())
        self.model = Decoder(
            config, kernels or Kernels(), attention_dropout, hidden_dropout, recompute, self.balance, offload
        )
        (kernels or Kernels()).attach(self)
        if config.adapters is not None:
            attach_adapters(self.model.layers, config.adapters)
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
        logits: Literal["all"] | Tensor = "all",
        z_loss_coeff: float = 0.0,
    ) -> Tensor:
        """What is returned depends on what is given.

        - labels and weights: sum(weights * nll), a scalar in fp32; with a z-loss, two terms whose sum is
          the loss (see `model/loss.py`). A label is the token that should follow; where the weight
          is 0 it may be anything. For fp16, put the loss scale into the weights.
        - labels alone: the nll of each token, fp32 [B, S], without gradients.
        - neither: logits [B, S, V] in the dtype of the weights; with `logits` (i64 [R], positions of S) those of
          these alone, [B, R, V].
        - whatever is given, by a part that is not the last: hidden states [B, S, E]. One that is not the first
          takes them in place of tokens; `positions_BS` then have to be given where S is cut.

        `positions_BS` are RoPE positions (0, 1, ... where not given; required with a cache).
        `segments_BS`, integers: a token sees the tokens up to itself that have its own number; None:
        all up to itself. With a cache, which knows the texts that the tokens belong to, B is 1 and there are none.
        """
        hidden_BSE: Tensor = self.model(tokens_BS, positions_BS, segments_BS, cache)
        if not self.model.is_last:
            return hidden_BSE
        if labels_BS is None:
            chosen_BSE = hidden_BSE[:, logits] if isinstance(logits, Tensor) else hidden_BSE
            logits_BSV = F.linear(chosen_BSE, self.head_weight)
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
