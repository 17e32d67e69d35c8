"""Bytes of activations that autograd keeps, operation by operation as `tessel.model` has them.

For symbols see `tessel.layout.memory`. A layer keeps, for each of N (n) tokens,

    the input of a norm            b E (n), and rsqrt; without a fused kernel 2 x 4 E, in fp32
    what a norm gives              b E (N)
    query, key, value, result      b (2 H + 2 G), and 4 bytes for each head's log-sum-exp
    before norms of query and key  b (H + G), or 2 x 4 (H + G)
    gate, silu(gate), up, product  4 b F

A mixture keeps the last for each of its K routed copies of a token, these copies and what came back, and fp32
scores of every expert. Recomputing `mlp` keeps what goes into MLP or mixture; `full` what goes into the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessel.layout.choice import Choice, RoutedShape

MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 256, 8192


@dataclass(frozen=True)
class Kernels:
    """What the device's kernels keep. `fused_norm`: RMSNorm keeps its input, not fp32 copies of it.

    `chunk_logits_bytes` are those of the fp32 logits of one chunk of the loss (`tessel.model.loss`).
    `sums_copy`: between processes, gradients are summed in a copy of what is sent, as Gloo does.
    """

    fused_norm: bool = True
    chunk_logits_bytes: int = 512 * 2**20
    sums_copy: bool = False


ON_DEVICE = Kernels()
ON_CPU = Kernels(fused_norm=False, chunk_logits_bytes=64 * 2**20, sums_copy=True)


class Activations:
    """Predicts for one model on one kind of device."""

    def __init__(self, config: RoutedShape, kernels: Kernels) -> None:
        self.config, self.kernels = config, kernels

    def layer(self, choice: Choice, mixture: bool) -> int:
        """What one layer keeps of one micro-batch, recomputation considered."""
        if choice.recompute == "full":
            return choice.compute_bytes * self.config.hidden_size * _between(choice)
        kept = self.whole_layer(choice, mixture)
        if choice.recompute == "selective":
            return kept - 4 * choice.tokens * self._heads(choice)[0]
        return kept - self.again(choice, mixture)

    def again(self, choice: Choice, mixture: bool) -> int:
        """What backward brings back of one layer at a time."""
        if choice.recompute == "full":
            return self.whole_layer(choice, mixture)
        if choice.recompute != "mlp":
            return 0
        inside = self._mixture(choice) if mixture else self._mlp(choice, self.config.intermediate_size)
        return inside - choice.compute_bytes * self.config.hidden_size * _between(choice)

    def whole_layer(self, choice: Choice, mixture: bool) -> int:
        """What one layer keeps of one micro-batch without recomputation."""
        c, b, tokens = self.config, choice.compute_bytes, choice.tokens
        heads, kv_heads = self._heads(choice)
        width, kv_width = heads * c.head_dim, kv_heads * c.head_dim
        attention = b * tokens * (c.hidden_size + 2 * width + 2 * kv_width) + 4 * tokens * heads
        if c.qk_norm:
            attention += self._norm(b, tokens * (width + kv_width), tokens * (heads + kv_heads))
        norms = 2 * self._norm(b, _between(choice) * c.hidden_size, _between(choice))
        return attention + norms + (self._mixture(choice) if mixture else self._mlp(choice, c.intermediate_size))

    def _heads(self, choice: Choice) -> tuple[int, int]:
        """Query and key/value heads of a rank; the latter are copied where there are fewer than ranks."""
        tp = choice.topology.tp
        return self.config.num_attention_heads // tp, max(self.config.num_key_value_heads // tp, 1)

    def _norm(self, b: int, elements: int, rows: int) -> int:
        return (b if self.kernels.fused_norm else 8) * elements + 4 * rows

    def _mlp(self, choice: Choice, width: int) -> int:
        """Its input, gathered under sequence parallelism, and four tensors inside."""
        inner = width // choice.topology.tp
        return choice.compute_bytes * choice.tokens * (self.config.hidden_size + 4 * inner)

    def _mixture(self, choice: Choice) -> int:
        """Input, router, routed tokens where their experts are, the experts' insides, results; the shared expert."""
        c, b, topology = self.config, choice.compute_bytes, choice.topology
        tokens = _between(choice)
        routed = tokens * c.num_experts_per_tok
        at_experts = routed * topology.etp  # as many come as go, where experts are equally liked
        inside = c.hidden_size + 4 * c.moe_intermediate_size // topology.etp
        kept = b * tokens * c.hidden_size + 12 * tokens * c.num_experts + 24 * routed
        kept += b * (routed * c.hidden_size + at_experts * inside)
        if c.shared_expert_intermediate_size:
            kept += self._mlp(choice, c.shared_expert_intermediate_size)
        return kept

    def group(self, choice: Choice, mixture: bool) -> int:
        """What of a layer is gone when its largest group's gradients are summed; those of experts come first."""
        kept = self.layer(choice, mixture)
        return min(self._mixture(choice), kept) if mixture else kept

    def after_layers(self, choice: Choice) -> int:
        """What the last norm keeps."""
        return self._norm(choice.compute_bytes, _between(choice) * self.config.hidden_size, _between(choice))

    def inside_backward(self, choice: Choice, mixture: bool) -> int:
        """The most that the backward of a layer takes beside what is kept: twice the width of the MLP, and of E."""
        c, b = self.config, choice.compute_bytes
        if mixture:
            routed = _between(choice) * c.num_experts_per_tok * choice.topology.etp
            wide = b * routed * (2 * c.moe_intermediate_size // choice.topology.etp + c.hidden_size)
        else:
            wide = 2 * b * choice.tokens * (c.intermediate_size // choice.topology.tp)
        return wide + 2 * b * choice.tokens * c.hidden_size

    def loss_workspace(self, choice: Choice, rows: int) -> int:
        """The most that head and loss take: logits of a chunk, the head's gradient, the hidden states' and themselves.

        In low precision the logits are there twice, and the gradient beside its fp32 sum.
        """
        b, hidden = choice.compute_bytes, self.config.hidden_size
        chunk = min(max(self.kernels.chunk_logits_bytes // (4 * rows), MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)
        logits = min(chunk, choice.tokens) * rows * (4 if b == 4 else 4 + b)
        return logits + rows * hidden * (4 if b == 4 else 4 + b) + 2 * b * choice.tokens * hidden


def _between(choice: Choice) -> int:
    """Tokens of a rank between attention and MLP."""
    return choice.tokens // choice.topology.tp if choice.sequence_parallel else choice.tokens
