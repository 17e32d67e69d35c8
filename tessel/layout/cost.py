"""Bytes sent and seconds taken by one training step on the slowest rank.

An estimate, to tell layouts from each other: products and attention at the rates of `Rates`, elementwise work at the
speed of memory, collectives at that of the slowest link they cross. Volumes are the textbook's, which the
strategies in `tessel.parallel` state and keep. For symbols see `tessel.layout.memory`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessel.layout.choice import Choice, RoutedShape
from tessel.layout.memory import MemoryModel, Stage
from tessel.layout.rates import Rates

# Passes over memory: of forward and backward, by those of forward; of the loss over fp32 logits, in bytes; of AdamW
# and of the norm and the clipping before it, in bytes of an element.
_BACKWARD_TRAFFIC = 2.7
_LOSS_BYTES_PER_LOGIT = 40
_OPTIMIZER_BYTES = 42
# Attention over a shared sequence goes block by block.
_BLOCKWISE = 1.15


@dataclass(frozen=True)
class Cost:
    """Of one step. `sent` are bytes by axis from one rank; `bubble` is the idle share of the pipeline's time."""

    sent: dict[str, float]
    bubble: float
    compute_s: float
    communication_s: float
    step_s: float


class CostModel:
    """Predicts for one model, one kind of device, and machines of `devices_per_node`."""

    def __init__(self, memory: MemoryModel, rates: Rates, devices_per_node: int = 8) -> None:
        self._memory, self._rates, self._per_node = memory, rates, devices_per_node
        self._config: RoutedShape = memory.config

    def step(self, choice: Choice) -> Cost:
        """The cost of a step: its micro-batches through the slowest stage, filling and draining, then the update."""
        topology, count = choice.topology, choice.num_micro_batches
        last = topology.pp - 1
        ranks = {0, last, choice.layers.index(max(choice.layers))}
        stages = [self._memory.stage(choice, rank) for rank in ranks]
        compute_s = max(self._compute_s(choice, stage) for stage in stages)
        slowest = max(stages, key=lambda stage: stage.num_dense + stage.num_mixtures)
        sent = self._sent(choice, slowest)
        links_s = self._links_s(choice, sent)
        attention_s = self._attention_s(choice, slowest)
        # A ring computes with one part while the next is on its way.
        links_s["cp"] = max(links_s["cp"] - count * attention_s, 0.0)
        dp_s = links_s.pop("dp")
        bubble = last / (count * choice.num_chunks)
        busy_s = count * compute_s + sum(links_s.values())
        # Gathers and sums run beside the computation of other layers, in a pipeline only after its last backward.
        hidden_s = compute_s * (count if choice.reduces_each or choice.reshards else 1) * (0.8 if last == 0 else 0.2)
        exposed_s = max(dp_s - hidden_s, 0.05 * dp_s)
        step_s = busy_s * (1 + bubble) + exposed_s + self._update_s(choice)
        idle = bubble / (1 + bubble)
        return Cost(sent, idle, count * compute_s, sum(links_s.values()) + exposed_s, step_s)

    def _compute_s(self, choice: Choice, stage: Stage) -> float:
        """Forward and backward of one micro-batch on a stage."""
        c, topology = self._config, choice.topology
        weights = self._memory.weights(topology.tp, topology.etp, topology.ep)
        tokens = choice.tokens
        passes = 8 if choice.recompute == "full" else 6
        in_mlp = 8 if choice.recompute in ("full", "mlp") else 6
        dense = stage.num_dense * weights.dense_layer + stage.num_mixtures * weights.mixture_layer
        flops = tokens * (passes * dense + (in_mlp - passes) * self._mlp_weights(choice, stage))
        small = min(c.hidden_size, c.num_attention_heads * c.head_dim // topology.tp)
        seconds = self._matmul_s(flops, small)
        if stage.num_mixtures:
            a_expert = weights.experts * topology.ep / c.num_experts
            routed = tokens / (topology.tp if choice.sequence_parallel else 1) * c.num_experts_per_tok * topology.etp
            # Few tokens for each of many experts fill the device badly.
            each = routed * topology.ep / c.num_experts
            width = min(c.moe_intermediate_size / topology.etp, each)
            seconds += self._matmul_s(in_mlp * routed * a_expert * stage.num_mixtures, width)
        attention_s = self._attention_s(choice, stage)
        seconds += attention_s * (4 / 3 if choice.recompute in ("selective", "full") else 1)
        seconds += self._elementwise_s(choice, stage)
        if stage.is_last:
            head = weights.head or weights.embedding
            seconds += self._matmul_s(6 * tokens * head, c.hidden_size)
            seconds += tokens * head / c.hidden_size * _LOSS_BYTES_PER_LOGIT / self._memory_rate
        return seconds

    def _mlp_weights(self, choice: Choice, stage: Stage) -> float:
        c = self._config
        return 3 * c.hidden_size * c.intermediate_size / choice.topology.tp * stage.num_dense

    def _matmul_s(self, flops: float, size: float) -> float:
        rates = self._rates
        return flops / (rates.matmul_tflops * 1e12 * size / (size + rates.half_rate_size))

    def _attention_s(self, choice: Choice, stage: Stage) -> float:
        """6 x heads x head_dim x sequence operations a token (`tessel.train.flops`)."""
        c = self._config
        width = c.num_attention_heads * c.head_dim / choice.topology.tp
        flops = 6 * width * choice.seq_length * choice.tokens * (stage.num_dense + stage.num_mixtures)
        return flops / (self._rates.attention_tflops * 1e12) * (_BLOCKWISE if choice.topology.cp > 1 else 1)

    def _elementwise_s(self, choice: Choice, stage: Stage) -> float:
        """Norms, residual sums, rotations, gates: what they read and write."""
        c, tp = self._config, choice.topology.tp
        between = 10 * c.hidden_size / (tp if choice.sequence_parallel else 1)
        inside = 4 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim / tp
        dense = stage.num_dense * (between + inside + 5 * c.intermediate_size / tp)
        routed = c.num_experts_per_tok * (5 * c.moe_intermediate_size + 8 * c.hidden_size) / tp
        mixtures = stage.num_mixtures * (between + inside + routed)
        moved = choice.compute_bytes * choice.tokens * (dense + mixtures)
        passes = _BACKWARD_TRAFFIC + {"full": 1.0, "mlp": 0.5}.get(choice.recompute, 0.0)
        return moved * passes / self._memory_rate

    def _update_s(self, choice: Choice) -> float:
        memory = self._memory.of_rank(choice, 0)
        return memory.parameters / 4 * _OPTIMIZER_BYTES / self._memory_rate

    @property
    def _memory_rate(self) -> float:
        return self._rates.memory_gb_per_s * 1e9

    def _sent(self, choice: Choice, stage: Stage) -> dict[str, float]:
        """Bytes that a rank sends in a step, by axis."""
        c, t, count = self._config, choice.topology, choice.num_micro_batches
        hidden = choice.compute_bytes * choice.tokens * c.hidden_size
        between = hidden / (t.tp if choice.sequence_parallel else 1)
        layers = stage.num_dense + stage.num_mixtures
        again = 1.5 if choice.recompute == "full" else 1.0
        again_in_mlp = 1.5 if choice.recompute in ("full", "mlp") else 1.0
        # Four crossings a dense layer and two of attention alone, each there and back; embedding and head.
        crossings = 2 * layers * again + 2 * stage.num_dense * again_in_mlp + stage.is_first + stage.is_last
        tp = count * crossings * 2 * hidden * (t.tp - 1) / t.tp
        kv_heads = max(c.num_key_value_heads / t.tp, 1)
        kv = 2 * choice.compute_bytes * choice.tokens * kv_heads * c.head_dim
        # Keys and values round the ring in forward and in backward, there with their gradients.
        cp = count * layers * kv * (t.cp - 1) * (4 if choice.recompute in ("full", "selective") else 3)
        pp = count * choice.num_chunks * 2 * between if t.pp > 1 else 0.0
        routed = between * c.num_experts_per_tok
        ep = count * stage.num_mixtures * 4 * again_in_mlp * routed * ((t.ep - 1) / t.ep + t.etp - 1)
        return {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "dp": self._sent_by_replicas(choice, stage)}

    def _sent_by_replicas(self, choice: Choice, stage: Stage) -> float:
        """Gathers of weights and sums of gradients; over all replicas, or within a copy and then between copies."""
        t, count = choice.topology, choice.num_micro_batches
        weights = self._memory.weights(t.tp, t.etp, t.ep)
        dense = stage.num_dense * weights.dense_layer + stage.num_mixtures * weights.mixture_layer
        dense += weights.embedding * stage.is_first + weights.head * stage.is_last
        shards, expert_shards = choice.num_shards
        gathers = 2 * count if choice.reshards else 1
        sums = count if choice.reduces_each else 1
        total = 0.0
        for elements, size, parts in (
            (dense, t.dp * t.cp, shards),
            (stage.num_mixtures * weights.experts, t.edp, expert_shards),
        ):
            share, copies = (parts - 1) / parts, size // parts
            total += elements * share * (choice.compute_bytes * gathers + 4 * sums)
            total += 4 * elements / parts * 2 * (copies - 1) / copies * sums
        return total

    def _links_s(self, choice: Choice, sent: dict[str, float]) -> dict[str, float]:
        """Seconds of each axis by the links that it crosses; neighbours on tp, then cp, then dp share a machine."""
        t, count = choice.topology, choice.num_micro_batches
        layers = max(choice.layers)
        latency_s = self._rates.latency_us * 1e-6
        return {
            "tp": sent["tp"] / self._ring_rate(1, t.tp) + latency_s * count * layers * 8 * (t.tp > 1),
            "cp": sent["cp"] / (self._rate_of(t.tp * t.cp)) + latency_s * count * layers * 3 * (t.cp - 1),
            "pp": sent["pp"] / self._rate_of(t.world_size) + latency_s * count * choice.num_chunks * 2 * (t.pp > 1),
            "ep": self._all_to_all_s(sent["ep"], t.etp, t.ep) + latency_s * count * layers * 6 * (t.ep > 1),
            "dp": sent["dp"] / self._ring_rate(t.tp, t.tp * t.cp * t.dp) + self._hops_s(choice),
        }

    def _hops_s(self, choice: Choice) -> float:
        """What a ring over replicas takes however little it sends, a group of parameters at a time."""
        num_replicas = choice.topology.dp * choice.topology.cp
        if num_replicas == 1:
            return 0.0
        each_micro_batch = (2 if choice.reshards else 0) + (1 if choice.reduces_each else 0)
        rings = max(choice.layers) * max(choice.num_micro_batches * each_micro_batch, 2)
        return rings * (self._rates.latency_us + num_replicas * self._rates.hop_us) * 1e-6

    def _rate_of(self, extent: int) -> float:
        """Bytes per second to a neighbour, the slowest among so many ranks in a row."""
        rates = self._rates
        return (rates.node_gb_per_s if extent <= self._per_node else rates.network_gb_per_s) * 1e9

    def _ring_rate(self, stride: int, extent: int) -> float:
        """Of a ring whose members on one machine each have a link out of it."""
        members = max(self._per_node // stride, 1)
        inside = self._rates.node_gb_per_s * 1e9
        return inside if extent <= self._per_node else min(inside, self._rates.network_gb_per_s * 1e9 * members)

    def _all_to_all_s(self, sent: float, stride: int, degree: int) -> float:
        members = min(max(self._per_node // stride, 1), degree)
        outside = 0.0 if degree == 1 else (degree - members) / degree
        rates = self._rates
        return sent * (outside / rates.network_gb_per_s + (1 - outside) / rates.node_gb_per_s) / 1e9
