"""Every row of the table of kernels against plain formulas in fp64, on odd shapes, forward and backward.

Shape suffixes: B batch, S sequence, H query heads, G key/value heads, D head_dim, T tokens, E hidden, F inner width,
X experts, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessel.config.run import Optimizer
from tessel.model.attention import Visibility, plain_attention
from tessel.model.attention_block import BLOCKS
from tessel.model.kernels import OPERATIONS, unavailable
from tessel.model.loss import chunked_linear_cross_entropy
from tessel.runtime import device as devices
from tessel.selftest.result import Check, SkippedError, WrongError, check
from tessel.train.optimizer import build_optimizer

PART = "kernels"
# Largest ||ours - reference|| / ||reference|| of an output or a gradient.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# B, S, H, G, D: a plain one, and odd ones.
ATTENTION_SHAPES = ((2, 64, 4, 2, 64), (1, 77, 3, 1, 24), (3, 33, 4, 4, 16))
ROW_SHAPES = ((2, 64, 64), (1, 77, 48), (3, 5, 200))
DOCUMENT = 19
"""Tokens of a document; of the last of a row, fewer."""
OPTIMIZER_STEPS = 3

Computation = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A computation of some inputs (fp32, on the CPU), and the plain one that it is held against."""

    inputs: tuple[Tensor, ...]
    ours: Computation
    reference: Computation


def run(device: torch.device) -> Iterator[Check]:
    """A check for each row of the table, and for what has one form alone."""
    for operation, rows in OPERATIONS.items():
        # Of two names of one function, the first.
        for row in {function: row for row, function in reversed(rows.items())}.values():
            yield check(PART, f"{operation}: {row}", lambda o=operation, r=row: _row(device, o, r))  # type: ignore[misc]
    for name in BLOCKS:
        yield check(PART, f"attention of blocks: {name}", lambda n=name: _block(device, n))  # type: ignore[misc]
    yield check(PART, "loss in chunks", lambda: compare(device, _loss_cases()))
    yield check(PART, "AdamW", lambda: _adamw(device))


def _row(device: torch.device, operation: str, row: str) -> str:
    reason = unavailable(row, device)
    if reason is not None:
        raise SkippedError(reason)
    dtypes = (torch.bfloat16, torch.float16) if row == "flash" else tuple(TOLERANCES)
    return compare(device, CASES[operation](OPERATIONS[operation][row]), dtypes)


def compare(device: torch.device, cases: Sequence[Case], dtypes: Sequence[torch.dtype] = tuple(TOLERANCES)) -> str:
    """The worst relative error of each dtype, in words.

    Raises:
        WrongError: one is above its tolerance.
    """
    found = []
    for dtype in dtypes:
        worst = max(worst_error(case, device, dtype) for case in cases)
        text = f"{worst:.1e} in {str(dtype).removeprefix('torch.')}"
        if not worst <= TOLERANCES[dtype]:  # NaN fails, too
            raise WrongError(f"{text} is above {TOLERANCES[dtype]:.0e}")
        found.append(text)
    return f"{len(cases)} shapes, largest error {', '.join(found)}"


def worst_error(case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of the output and the gradients, against fp64 from the same rounded inputs."""
    rounded = [x.to(dtype) for x in case.inputs]
    expected = _with_gradients(case.reference, [x.double() for x in rounded], dtype)
    actual = _with_gradients(case.ours, [x.to(device) for x in rounded], dtype)
    return max(_error(a, e) for a, e in zip(actual, expected, strict=True))


def _with_gradients(computation: Computation, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = computation(*leaves)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(out.shape, generator=generator).to(dtype).to(out.dtype).to(out.device)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _error(actual: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.cpu().double() - expected)
    return float(difference / torch.linalg.vector_norm(expected).clamp(min=1e-30))


def _random(*shapes: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) * scale for shape in shapes)


def _attention_cases(kernel: Computation) -> list[Case]:
    """Causal, with documents by a mask and by their lengths, with a window, and both."""

    def case(shape: tuple[int, ...], documents: bool, lengths: bool, window: int | None) -> Case:
        batch, length, heads, groups, dim = shape
        segments_BS = (torch.arange(length) // DOCUMENT).expand(batch, -1) if documents else None
        of_row = [min(DOCUMENT, length - first) for first in range(0, length, DOCUMENT)]
        runs = tuple(of_row * batch) if lengths else None

        def with_kernel(kernel: Computation) -> Computation:
            def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                segments = None if segments_BS is None else segments_BS.to(q.device)
                return kernel(q, k, v, Visibility(segments, runs), window, 0.0)

            return compute

        kv_shape = (batch, length, groups, dim)
        inputs = _random((batch, length, heads, dim), kv_shape, kv_shape)
        return Case(inputs, with_kernel(kernel), with_kernel(plain_attention))

    variants = ((False, False, None), (True, False, None), (True, True, None), (False, False, 9), (True, False, 9))
    return [case(shape, *variant) for shape in ATTENTION_SHAPES for variant in variants]


def _norm_cases(kernel: Computation) -> list[Case]:
    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * weight

    return [
        Case(_random(shape, shape[-1:]), lambda x, weight: kernel(x, weight, 1e-6), reference) for shape in ROW_SHAPES
    ]


def _residual_norm_cases(kernel: Callable[..., tuple[Tensor, Tensor]]) -> list[Case]:
    def reference(x: Tensor, added: Tensor, weight: Tensor) -> Tensor:
        summed = x + added
        return torch.cat((summed, summed * (summed.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * weight))

    def ours(x: Tensor, added: Tensor, weight: Tensor) -> Tensor:
        return torch.cat(kernel(x, added, weight, 1e-6))

    return [Case(_random(shape, shape, shape[-1:]), ours, reference) for shape in ROW_SHAPES]


def _rotary_cases(kernel: Computation) -> list[Case]:
    def case(shape: tuple[int, ...]) -> Case:
        batch, length, heads, _, dim = shape
        angles_BSP = torch.arange(length)[None, :, None] * 0.5 ** torch.arange(dim // 2)
        angles_BS1D = torch.cat((angles_BSP, angles_BSP), dim=-1)[:, :, None]

        def ours(x_BSHD: Tensor) -> Tensor:
            cos, sin = (y.to(x_BSHD.dtype).to(x_BSHD.device) for y in (angles_BS1D.cos(), angles_BS1D.sin()))
            return kernel(x_BSHD, cos, sin)

        def reference(x_BSHD: Tensor) -> Tensor:
            left, right = x_BSHD.chunk(2, dim=-1)
            return x_BSHD * angles_BS1D.cos() + torch.cat((-right, left), dim=-1) * angles_BS1D.sin()

        return Case(_random((batch, length, heads, dim)), ours, reference)

    return [case(shape) for shape in ATTENTION_SHAPES]


def _swiglu_cases(kernel: Computation) -> list[Case]:
    return [Case(_random(shape, shape), kernel, lambda gate, up: gate * gate.sigmoid() * up) for shape in ROW_SHAPES]


def _grouped_cases(kernel: Computation) -> list[Case]:
    """Groups of several lengths, one of them empty; the last sizes suit no kernel that wants rows of 16 bytes."""

    def case(counts: tuple[int, ...], inner: int, outer: int) -> Case:
        def ours(rows_TE: Tensor, weight_XFE: Tensor) -> Tensor:
            return kernel(rows_TE, weight_XFE, torch.tensor(counts, device=rows_TE.device))

        def reference(rows_TE: Tensor, weight_XFE: Tensor) -> Tensor:
            parts = zip(rows_TE.split(counts), weight_XFE.unbind(0), strict=True)
            return torch.cat([part @ weight.T for part, weight in parts])

        return Case(_random((sum(counts), inner), (len(counts), outer, inner)), ours, reference)

    return [case((5, 0, 16, 3), 32, 48), case((1, 40), 64, 16), case((7, 2, 4), 19, 27)]


def _routing_cases(kernel: tuple[Callable[..., Any], Callable[..., Any]]) -> list[Case]:
    """Tokens to rows that are sorted by expert, something done to the rows, and back."""
    spread, combine = kernel

    def case(tokens: int, hidden: int, topk: int) -> Case:
        experts_TK = torch.rand(tokens, 7, generator=torch.Generator().manual_seed(4)).topk(topk, dim=1).indices
        order_N = experts_TK.flatten().argsort(stable=True)

        def ours(x_TE: Tensor, scale_NE: Tensor, weights_TK: Tensor) -> Tensor:
            rows_NE, places_N = spread(x_TE, experts_TK.to(x_TE.device))
            combined: Tensor = combine(rows_NE * scale_NE, places_N, weights_TK)
            return combined

        def reference(x_TE: Tensor, scale_NE: Tensor, weights_TK: Tensor) -> Tensor:
            rows_NE = x_TE[order_N // topk] * scale_NE * weights_TK.flatten()[order_N, None]
            return torch.zeros_like(x_TE).index_add(0, order_N // topk, rows_NE)

        return Case(_random((tokens, hidden), (tokens * topk, hidden), (tokens, topk)), ours, reference)

    return [case(33, 64, 2), case(5, 24, 1), case(17, 16, 3)]


def _loss_cases() -> list[Case]:
    def case(tokens: int, hidden: int, rows: int) -> Case:
        generator = torch.Generator().manual_seed(3)
        labels_T = torch.randint(rows, (tokens,), generator=generator)
        weights_T = torch.rand(tokens, generator=generator)

        def ours(hidden_TE: Tensor, weight_VE: Tensor) -> Tensor:
            labels, weights = labels_T.to(hidden_TE.device), weights_T.to(hidden_TE.device)
            return chunked_linear_cross_entropy(hidden_TE, weight_VE, labels, weights, 64)

        def reference(hidden_TE: Tensor, weight_VE: Tensor) -> Tensor:
            return (F.cross_entropy(hidden_TE @ weight_VE.T, labels_T, reduction="none") * weights_T).sum()

        return Case(_random((tokens, hidden), (rows, hidden), scale=0.3), ours, reference)

    return [case(200, 64, 1000), case(65, 24, 307)]


CASES: dict[str, Callable[[Any], list[Case]]] = {
    "attention": _attention_cases,
    "norm": _norm_cases,
    "residual norm": _residual_norm_cases,
    "rotary": _rotary_cases,
    "swiglu": _swiglu_cases,
    "grouped": _grouped_cases,
    "routing": _routing_cases,
}


def _block(device: torch.device, name: str) -> str:
    """A causal block by itself, which is plain attention."""
    block, found = BLOCKS[name], []
    for dtype in TOLERANCES:
        for shape in ATTENTION_SHAPES:
            batch, length, heads, groups, dim = shape
            shapes = ((batch, heads, length, dim), *((batch, groups, length, dim),) * 2, (batch, heads, length, dim))
            *inputs, grad = (x.to(dtype) for x in _random(*shapes))
            q, k, v = (x.to(device) for x in inputs)
            if name != "plain" and devices.fused_block_attention(q, k, v, masked=False, causal=True) != name:
                continue
            out, lse = block.forward(q, k, v, None, True)
            actual = [out, *block.backward(grad.to(device), q, k, v, out, lse, None, True)]
            leaves = [x.double().requires_grad_() for x in inputs]
            q, k, v = (x.transpose(1, 2) for x in leaves)
            expected_out = plain_attention(q, k, v, Visibility(), None, 0.0).transpose(1, 2)
            expected = [expected_out.detach(), *torch.autograd.grad(expected_out, leaves, grad.double())]
            worst = max(_error(a, e) for a, e in zip(actual, expected, strict=True))
            if not worst <= TOLERANCES[dtype]:
                raise WrongError(f"{worst:.1e} in {dtype} at {shape} is above {TOLERANCES[dtype]:.0e}")
            found.append(worst)
    if not found:
        raise SkippedError(f"not for {device.type}")
    return f"{len(found)} shapes and dtypes, largest error {max(found):.1e}"


def _adamw(device: torch.device) -> str:
    """Some steps of the optimizer of a run against Loshchilov and Hutter's formula (arXiv 1711.05101) in fp64."""
    options = Optimizer(lr=1e-2, weight_decay=0.1)
    start, *grads = _random(*[(5, 33)] * (1 + OPTIMIZER_STEPS))
    parameter = torch.nn.Parameter(start.to(device))
    group = {"params": [parameter], "names": ["w"], "wd_mult": 1.0, "is_decoupled_lr": False}
    optimizer = build_optimizer([group], options)
    expected, mean, square = start.double(), torch.zeros(5, 33).double(), torch.zeros(5, 33).double()
    beta1, beta2 = options.adam_beta1, options.adam_beta2
    for step, grad in enumerate(grads, 1):
        parameter.grad = grad.to(device)
        optimizer.step()
        mean, square = beta1 * mean + (1 - beta1) * grad, beta2 * square + (1 - beta2) * grad.double() ** 2
        update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + options.adam_eps)
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * update
    error = _error(parameter.detach(), expected)
    if not error <= 1e-6:
        raise WrongError(f"parameters differ by {error:.1e} after {OPTIMIZER_STEPS} steps")
    return f"{OPTIMIZER_STEPS} steps, error {error:.1e}"
