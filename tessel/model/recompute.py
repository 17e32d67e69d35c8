"""Activations that are computed again in backward instead of kept. Changes no number, dropout included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tessel.config.memory import Memory
from tessel.config.run import Kernels
from tessel.errors import UsageError

CORE_ATTENTION, LAYERNORM, MLP, ACTIVATION = "core_attn", "layernorm", "mlp", "activation"
MOE, MOE_ACTIVATION, SHARED_EXPERTS = "moe", "moe_act", "shared_experts"
OF_EXPERTS = frozenset({MOE, MOE_ACTIVATION, SHARED_EXPERTS})


@dataclass(frozen=True)
class Recompute:
    """Which activations are computed again.

    full, uniform: every layer, `num_layers` in one unit, of which only the input is kept. full, block:
    each of the first `num_layers` layers. selective: `modules` inside every layer (`modules_of` says what
    each means). Beside them, or alone: the activation inside the MLPs of `activation_layers` layers (None:
    of all) after those that are recomputed as a whole.
    """

    granularity: Literal["full", "selective"] | None
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1
    modules: frozenset[str] = frozenset({CORE_ATTENTION})
    activation_layers: int | None = 0

    @classmethod
    def from_options(
        cls, kernels: Kernels, memory: Memory | None = None, *, has_experts: bool = False
    ) -> Recompute | None:
        """From `--recompute-*`; None where nothing is recomputed.

        Raises:
            UsageError: full recomputation without a method, a number of layers below 1, or a module that the
                model does not have.
        """
        memory = memory or Memory()
        granularity = kernels.recompute_granularity or ("selective" if kernels.recompute_activations else None)
        activation_layers = (
            memory.recompute_activation_function_num_layers if memory.recompute_activation_function else 0
        )
        if granularity is None:
            return None if activation_layers == 0 else cls(None, activation_layers=activation_layers)
        if granularity == "selective":
            modules = frozenset(memory.recompute_modules or (CORE_ATTENTION,))
            if not has_experts and modules & OF_EXPERTS:
                asked = " ".join(sorted(modules & OF_EXPERTS))
                raise UsageError(
                    f"--recompute-modules {asked} is for models with experts, and this one has none: take mlp."
                )
            return cls("selective", modules=modules, activation_layers=activation_layers)
        if kernels.recompute_method is None:
            raise UsageError("--recompute-granularity full needs --recompute-method; give uniform or block.")
        num_layers = 1 if kernels.recompute_num_layers is None else kernels.recompute_num_layers
        if num_layers < 1:
            raise UsageError(f"--recompute-num-layers {num_layers} must be at least 1.")
        method: Literal["uniform", "block"] = "block" if kernels.recompute_method == "block" else "uniform"
        return cls("full", method, num_layers, activation_layers=activation_layers)

    def units(self, num_layers: int) -> list[tuple[int, int]]:
        """The units recomputed as a whole: (first layer, layer after the last), counted from the first layer here."""
        if self.granularity != "full":
            return []
        if self.method == "block":
            return [(layer, layer + 1) for layer in range(min(self.num_layers, num_layers))]
        return [(first, min(first + self.num_layers, num_layers)) for first in range(0, num_layers, self.num_layers)]

    def num_whole(self, num_layers: int) -> int:
        """How many layers, the first ones here, are recomputed as a whole."""
        units = self.units(num_layers)
        return units[-1][1] if units else 0

    def parts(self, num_layers: int) -> list[tuple[int, int, bool]]:
        """All layers here, in order: (first, after the last, whether recomputed as a whole)."""
        rest = range(self.num_whole(num_layers), num_layers)
        return [*((*unit, True) for unit in self.units(num_layers)), *((layer, layer + 1, False) for layer in rest)]

    def modules_of(self, layer: int, num_layers: int) -> frozenset[str]:
        """What is recomputed inside a layer, the `layer`-th of `num_layers` here; nothing of one recomputed whole.

        core_attn: attention between rotary positions and output projection. layernorm: the layer's two
        norms, output included. mlp: the dense MLP. activation: silu(gate) * up of the dense MLP, output
        included. moe: router and experts. moe_act: the activation inside the experts, output included.
        shared_experts: the expert that sees every token.
        """
        first = self.num_whole(num_layers)
        if layer < first:
            return frozenset()
        modules = self.modules if self.granularity == "selective" else frozenset()
        if self.activation_layers is None or layer < first + self.activation_layers:
            modules |= {ACTIVATION}
        return modules


class Hooks(Protocol):
    """What is done with the tensors that backward needs: see torch.autograd.graph.saved_tensors_hooks."""

    def pack(self, tensor: Tensor) -> Any:
        """What is kept instead of the tensor."""
        ...

    def unpack(self, packed: Any) -> Tensor:
        """The tensor again."""
        ...


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), of which only the inputs are kept. Random numbers are drawn again as they were."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    out: Tensor = checkpoint(function, *inputs, use_reentrant=False)
    return out


def forgetting(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    consumer: Callable[[Tensor], Tensor],
    outer: Hooks | None = None,
) -> Tensor:
    """consumer(function(*inputs)), where backward has neither what is inside `function` nor its output kept for it.

    `recomputed` alone would free little: the product that follows keeps its input, which is the output of
    `function`. Here, whatever `consumer` keeps of that output is computed again from `inputs`, once, when
    backward first asks for it. `function` draws no random numbers. torch applies only the innermost hooks
    to a saved tensor: `outer` are those around this call, if there are any.
    """
    if not torch.is_grad_enabled():
        return consumer(function(*inputs))
    output: Tensor = checkpoint(
        lambda *tensors: _Marked.apply(function(*tensors)), *inputs, use_reentrant=False, preserve_rng_state=False
    )
    if output.grad_fn is None or output.numel() == 0:
        return consumer(output)
    hooks = _Forgetting(output, outer)
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        return consumer(output)


class _Marked(torch.autograd.Function):
    """The identity, with a node that can give its tensor: under `checkpoint`, by computing it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Output:
    """An output that is not kept; the node that marks it gives it once, and it stays as long as this object."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._tensor: Tensor | None = None

    def get(self) -> Tensor:
        if self._tensor is None:
            (self._tensor,) = self._node.saved_tensors
        return self._tensor


@dataclass(frozen=True)
class _View:
    """A tensor that lies in the storage of an output."""

    output: _Output
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Forgetting:
    """Hooks that keep, of an output and its views, only where they come from. Holds the output itself nowhere."""

    def __init__(self, output: Tensor, outer: Hooks | None) -> None:
        self._output = _Output(output.grad_fn)
        # No other tensor has this address while the output is alive, which is as long as tensors are packed.
        self._address = output.untyped_storage().data_ptr()
        self._dtype, self._begin = output.dtype, int(output.storage_offset())
        self._outer = outer

    def pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() == self._address and tensor.dtype is self._dtype:
            return _View(self._output, tensor.size(), tensor.stride(), int(tensor.storage_offset()) - self._begin)
        return tensor if self._outer is None else self._outer.pack(tensor)

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _View):
            whole = packed.output.get()
            return whole.as_strided(packed.size, packed.stride, whole.storage_offset() + packed.offset)
        return packed if self._outer is None else self._outer.unpack(packed)  # type: ignore[no-any-return]
