"""One process's part of a model that several run together, called as the whole one is.

Every process calls it with the same tokens and the same operations on its cache, which holds the keys and values of
its own layers and heads. Between two stages go 1 x N x E elements of the computation's dtype for a row of N tokens;
then the logits, R x V, go from the last stage to all.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from tessel.generate.cache import KeyValueCache
from tessel.layout.stages import Stage
from tessel.model.transformer import Transformer
from tessel.parallel.groups import Groups


class PartModel(nn.Module):
    """`part` is this process's stage of the model, cut by tensor parallelism.

    `multiple`: the row is padded to a multiple of so many tokens, since processes share them between layers.
    """

    def __init__(self, part: Transformer, stage: Stage, groups: Groups, multiple: int = 1) -> None:
        super().__init__()
        self.config, self.part = part.config, part
        self._stage, self._multiple, self._device = stage, multiple, groups.device
        self._group = groups.pp
        self._ranks = [] if groups.pp is None else distributed.get_process_group_ranks(groups.pp)
        self._dtype = next((parameter.dtype for parameter in part.parameters()), torch.float32)

    def forward(
        self,
        tokens_1N: Tensor,
        positions_1N: Tensor,
        *,
        cache: KeyValueCache | None = None,
        logits: Literal["all"] | Tensor = "all",
    ) -> Tensor:
        """See `batcher.Model`; the logits are alike on every process. `logits`: "all" for those of every token."""
        num_tokens = tokens_1N.shape[1]
        num_logits = num_tokens if isinstance(logits, str) else len(logits)
        more = -num_tokens % self._multiple
        if more:
            tokens_1N, positions_1N = F.pad(tokens_1N, (0, more)), F.pad(positions_1N, (0, more))
        inputs = tokens_1N if self._stage.is_first else self._received(num_tokens + more)
        padded = _Padded(cache, more) if more and cache is not None else cache
        output: Tensor = self.part(inputs, positions_1N, cache=padded, logits=logits)
        return self._shared(output[:, :num_logits] if self._stage.is_last else output, num_logits)

    def _received(self, num_tokens: int) -> Tensor:
        hidden_1NE = torch.empty(
            1, num_tokens // self._multiple, self.config.hidden_size, dtype=self._dtype, device=self._device
        )
        distributed.recv(hidden_1NE, self._ranks[self._stage.index - 1], self._group)
        return hidden_1NE

    def _shared(self, output: Tensor, num_logits: int) -> Tensor:
        """The last stage's logits, on every stage."""
        if self._group is None:
            return output
        output = output.contiguous()
        if not self._stage.is_last:
            distributed.send(output, self._ranks[self._stage.index + 1], self._group)
            output = torch.empty(1, num_logits, self.config.vocab_size, dtype=self._dtype, device=self._device)
        distributed.broadcast(output, self._ranks[-1], self._group)
        return output


class _Padded:
    """A cache for a row that has `more` tokens at its end than were staged; they attend to nothing."""

    def __init__(self, cache: KeyValueCache, more: int) -> None:
        self._cache, self._more = cache, more

    def attend(self, layer: int, q_1NHD: Tensor, k_1NGD: Tensor, v_1NGD: Tensor, window: int | None) -> Tensor:
        """See `KeyValueCache.attend`."""
        return F.pad(self._cache.attend(layer, q_1NHD, k_1NGD, v_1NGD, window), (0, 0, 0, 0, 0, self._more))
