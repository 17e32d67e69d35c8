"""Bytes that training takes on a rank, as sums over what this implementation allocates.

Weights, gradients and moments follow from the sharding table; activations from what autograd keeps of each
operation in `tessel.model`. Tests hold both against the tensors' own accounting. Small things are left out: token
ids, losses, masks, and what an operation takes inside itself.

Symbols: N tokens of a micro-batch on this rank, n those between attention and MLP (N / TP under sequence
parallelism), E hidden, H query and G key/value features of this rank (heads x head_dim), F features inside the
MLP of this rank, V vocabulary rows of this rank, b bytes of an element in forward and backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tessel.layout.activations import ON_DEVICE, Activations, Kernels
from tessel.layout.choice import Choice, RoutedShape, chunks_in_flight
from tessel.layout.sharding import rules
from tessel.layout.tiles import tile_of
from tessel.layout.topology import Place, Topology

WEIGHT_BYTES = 4
MOMENTS_BYTES = 8
_PLAIN_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    `gathered` are weights in the dtype of computation; `activations` are kept for backward, of all micro-batches in
    flight; `loss` is its workspace. `peak` is the most at one time, which the sum of the others may exceed, and
    which has what a layer's backward takes beside them.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int
    peak: int


@dataclass(frozen=True)
class Weights:
    """Elements of a rank's tiles: embedding, head, last norm, a layer of each kind without its experts, and these."""

    embedding: int
    head: int
    norm: int
    dense_layer: int
    mixture_layer: int
    experts: int


@dataclass(frozen=True)
class Stage:
    """What lies on a pipeline rank: layers without and with experts, embedding, head."""

    num_dense: int
    num_mixtures: int
    is_first: bool
    is_last: bool


class MemoryModel:
    """Predicts for one model, and keeps what it has worked out for a degree."""

    def __init__(self, config: RoutedShape, kernels: Kernels = ON_DEVICE) -> None:
        self.config = config
        self.activations = Activations(config, kernels)
        self._weights: dict[tuple[int, int, int], Weights] = {}
        self._mixtures = [config.has_experts(layer) for layer in range(config.num_hidden_layers)]

    def weights(self, tp: int, etp: int = 1, ep: int = 1) -> Weights:
        """The elements of a rank's tiles, padding included."""
        key = (tp, etp, ep)
        if key not in self._weights:
            self._weights[key] = self._count(*key)
        return self._weights[key]

    def _count(self, tp: int, etp: int, ep: int) -> Weights:
        topology = Topology(math.lcm(tp, etp * ep), tp=tp, ep=ep, etp=etp)
        size = {
            name: math.prod(tile_of(rule, topology, Place()).local_shape) for name, rule in rules(self.config).items()
        }
        layer = sum(n for name, n in size.items() if name.startswith("model.layers."))
        in_mlp = {name.split(".mlp.")[1]: n for name, n in size.items() if ".mlp." in name}
        plain = sum(n for name, n in in_mlp.items() if name.split(".")[0] in _PLAIN_MLP)
        experts = sum(n for name, n in in_mlp.items() if name.startswith("experts."))
        return Weights(
            embedding=size["model.embed_tokens.weight"],
            head=size.get("lm_head.weight", 0),
            norm=size["model.norm.weight"],
            dense_layer=layer - (sum(in_mlp.values()) - plain),
            mixture_layer=layer - plain - experts,
            experts=experts,
        )

    def stage(self, choice: Choice, pp_rank: int) -> Stage:
        """What a pipeline rank holds: of a mixture, as many layers of each kind as its layers of the whole have."""
        start = sum(choice.layers[:pp_rank])
        kinds = self._mixtures[start : start + choice.layers[pp_rank]]
        is_last = pp_rank == choice.topology.pp - 1
        return Stage(len(kinds) - sum(kinds), sum(kinds), pp_rank == 0, is_last)

    def worst(self, choice: Choice) -> tuple[int, Memory]:
        """(pipeline rank, memory) of the rank that needs most.

        Of ranks with equally many layers the first has most in flight; embedding and head are at the ends.
        """
        last = choice.topology.pp - 1
        ranks = {0, last, *(choice.layers.index(n) for n in set(choice.layers))}
        if last > 1:
            ranks.add(1 + choice.layers[1:last].index(max(choice.layers[1:last])))
        return max(((rank, self.of_rank(choice, rank)) for rank in sorted(ranks)), key=lambda pair: pair[1].peak)

    def of_rank(self, choice: Choice, pp_rank: int = 0) -> Memory:
        """The memory of a pipeline rank."""
        topology, b = choice.topology, choice.compute_bytes
        weights = self.weights(topology.tp, topology.etp, topology.ep)
        stage = self.stage(choice, pp_rank)
        root = self._root(weights, stage)
        dense = root + stage.num_dense * weights.dense_layer + stage.num_mixtures * weights.mixture_layer
        experts = stage.num_mixtures * weights.experts
        shards, expert_shards = choice.num_shards
        held = -(-dense // shards) - (-experts // expert_shards)
        largest = max(
            weights.dense_layer if stage.num_dense else 0,
            weights.mixture_layer + weights.experts if stage.num_mixtures else 0,
        )
        gathered = 0
        if choice.is_wrapped:
            gathered = b * (min(root + 2 * largest, dense + experts) if choice.reshards else dense + experts)
        kept = self._kept(choice, stage, pp_rank)
        head = (weights.head or weights.embedding) // self.config.hidden_size
        loss = self.activations.loss_workspace(choice, head) if stage.is_last else 0
        unsharded = choice.is_wrapped and not choice.reduces_each and choice.num_micro_batches > 1
        gradients = WEIGHT_BYTES * (dense + experts if unsharded else held)
        sizes = _Sizes(
            root=root,
            layer=largest,
            group=max(weights.experts, weights.mixture_layer) if stage.num_mixtures else weights.dense_layer,
            head=weights.head or weights.embedding,
            shards=expert_shards if stage.num_mixtures else shards,
            sums_copy=self.activations.kernels.sums_copy,
        )
        memory = Memory(
            parameters=WEIGHT_BYTES * held,
            gradients=gradients,
            optimizer=MOMENTS_BYTES * held,
            gathered=gathered,
            activations=kept,
            loss=loss,
            peak=0,
        )
        return replace(
            memory,
            peak=self._peak(choice, stage, memory, sizes),
        )

    @staticmethod
    def _root(weights: Weights, stage: Stage) -> int:
        """Elements outside the layers. A tied head is the embedding, of which the last stage has a copy."""
        embedding = weights.embedding if stage.is_first or (stage.is_last and not weights.head) else 0
        return embedding + (weights.head + weights.norm if stage.is_last else 0)

    def _kept(self, choice: Choice, stage: Stage, pp_rank: int) -> int:
        in_flight = chunks_in_flight(choice, pp_rank)
        a_layer = [self.activations.layer(choice, mixture) for mixture in (False, True)]
        of_layers = stage.num_dense * a_layer[0] + stage.num_mixtures * a_layer[1]
        kept = of_layers * in_flight // choice.num_chunks
        return kept + (self.activations.after_layers(choice) if stage.is_last else 0)

    def _peak(self, choice: Choice, stage: Stage, memory: Memory, sizes: _Sizes) -> int:
        """The most of these moments: the end of the last forward; backward of the last layer; of the first; the end.

        Of the first micro-batch there are no gradients before backward, and of a group none before its own. FSDP2
        has a group's gradients first as they come, in the dtype of computation, then as what is sent and what
        comes back, after it has dropped the gathered weights; alone it divides into a third copy.
        """
        b, wrapped, acts = choice.compute_bytes, choice.is_wrapped, self.activations
        mixture, is_only = stage.num_mixtures > 0, choice.num_micro_batches == 1
        held = memory.parameters + memory.optimizer
        inside = acts.inside_backward(choice, mixture)
        # Of a dense layer one matrix's gradient at a time; those of stacked experts are nearly all of the layer.
        inside += (b if wrapped else WEIGHT_BYTES) * sizes.layer // (1 if mixture and wrapped else 4)

        before = held + memory.gathered + memory.activations + (0 if is_only else memory.gradients)
        head = b * sizes.head if stage.is_last else 0
        hidden = b * choice.tokens * self.config.hidden_size if stage.is_last else 0
        start = before + (head if wrapped or is_only else 0) - (acts.after_layers(choice) if stage.is_last else 0)
        last_layer = start + hidden + acts.again(choice, mixture) + inside
        # A pipeline sums when all micro-batches are through.
        is_summed_here = wrapped and choice.topology.pp == 1
        last_sum = start - acts.group(choice, mixture) + sizes.summed(b, sizes.group) if is_summed_here else 0

        after = held + memory.parameters  # gradients are as large as what is held of the weights
        root = after + (sizes.summed(b, sizes.root) + b * sizes.root if wrapped else 0)
        if is_only:
            root -= WEIGHT_BYTES * sizes.root // sizes.shards
            after -= WEIGHT_BYTES * (sizes.root + sizes.layer) // sizes.shards
        after += (b * (sizes.root + sizes.layer) + head) if wrapped else 0
        first_layer = after + acts.whole_layer(choice, mixture) + inside
        first_sum = after + sizes.summed(b, sizes.group) if wrapped else 0
        return int(max(before + memory.loss, last_layer, last_sum, first_layer, first_sum, root))


@dataclass(frozen=True)
class _Sizes:
    """Elements before sharding: of the root's group, the largest layer and its largest group, and the head."""

    root: int
    layer: int
    group: int
    head: int
    shards: int
    sums_copy: bool

    def summed(self, b: int, elements: int) -> float:
        """What the sum over replicas takes of a group, less its gathered weights."""
        copies = 1 + 1 / self.shards + (self.shards == 1 or self.sums_copy)
        return max(WEIGHT_BYTES + b, WEIGHT_BYTES * copies) * elements - b * elements
