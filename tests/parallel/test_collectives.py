"""The collectives with gradients, against what one process computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributed

from tessel.parallel import collectives
from tests.parallel.processes import run

SHAPE = (4, 6, 2)


def of_rank(rank: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def total(shape: tuple[int, ...]) -> Tensor:
    """What the gradients sum to, of the cotangents that the ranks send back."""
    return sum((of_rank(100 + rank, shape) for rank in range(2)), torch.zeros(shape))


def part(x: Tensor, rank: int, dim: int) -> Tensor:
    return x.chunk(2, dim)[rank]


def through(function: Callable[..., Tensor], *arguments: object) -> tuple[Tensor, Tensor]:
    """(result, gradient) on this rank, of its own input and its own cotangent."""
    rank = distributed.get_rank()
    x = of_rank(rank).requires_grad_()
    y = function(x, distributed.group.WORLD, *arguments)
    y.backward(of_rank(100 + rank, tuple(y.shape)))
    assert type(y) is Tensor and x.grad is not None
    return y.detach(), x.grad


def every_pair() -> None:
    rank = distributed.get_rank()
    inputs = [of_rank(0), of_rank(1)]
    own = of_rank(100 + rank)

    y, grad = through(collectives.copy_to)
    assert torch.equal(y, inputs[rank])
    torch.testing.assert_close(grad, total(SHAPE))
    y, grad = through(collectives.reduce_from)
    torch.testing.assert_close(y, inputs[0] + inputs[1])
    assert torch.equal(grad, own)

    for dim in (0, 1, -2):
        joined = torch.cat(inputs, dim)
        y, grad = through(collectives.gather_from, dim)
        assert torch.equal(y, joined)
        torch.testing.assert_close(grad, part(total(tuple(joined.shape)), rank, dim))
        y, grad = through(collectives.join_from, dim)
        assert torch.equal(y, joined)
        assert torch.equal(grad, part(of_rank(100 + rank, tuple(joined.shape)), rank, dim))
        y, grad = through(collectives.scatter_to, dim)
        torch.testing.assert_close(y, part(inputs[0] + inputs[1], rank, dim))
        cut = tuple(y.shape)
        assert torch.equal(grad, torch.cat([of_rank(100, cut), of_rank(101, cut)], dim))

    y, grad = through(collectives.all_to_all)
    assert torch.equal(y, torch.cat([part(x, rank, 0) for x in inputs]))
    assert torch.equal(grad, torch.cat([part(of_rank(100 + other), rank, 0) for other in range(2)]))


def uneven_exchange() -> None:
    """Rank 0 sends 1 and 3 of its rows, rank 1 sends 4 and none."""
    rank = distributed.get_rank()
    sent, received = ([1, 3], [1, 4]) if rank == 0 else ([4, 0], [3, 0])
    y, grad = through(collectives.all_to_all, received, sent)
    expected = [torch.cat([of_rank(0)[:1], of_rank(1)]), of_rank(0)[1:]][rank]
    assert torch.equal(y, expected)
    back = [of_rank(100, (5, *SHAPE[1:])), of_rank(101, (3, *SHAPE[1:]))]
    assert torch.equal(grad, [torch.cat([back[0][:1], back[1]]), back[0][1:]][rank])


def uneven_parts() -> None:
    with pytest.raises(ValueError, match=r"dim 1 of \(4, 3\) is not a multiple of 2"):
        collectives.scatter_to(torch.zeros(4, 3), distributed.group.WORLD, 1)


def in_other_precisions() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.full((4, 2), 1.5, dtype=dtype)
        assert torch.equal(collectives.reduce_from(x, distributed.group.WORLD), 2 * x)
        assert torch.equal(collectives.scatter_to(x, distributed.group.WORLD, 0), 2 * x[:2])
        assert collectives.gather_from(x, distributed.group.WORLD, 0).dtype == dtype


def compiled() -> None:
    """A whole graph with every collective in it, whose numbers are those of the uncompiled one."""
    group = distributed.group.WORLD

    def function(x: Tensor) -> Tensor:
        y = collectives.gather_from(collectives.copy_to(x, group), group, 1) * 2
        y = collectives.reduce_from(collectives.scatter_to(y, group, 1).sin(), group)
        return collectives.all_to_all(collectives.join_from(y, group, 0).cos(), group)

    plain, fast = of_rank(distributed.get_rank()).requires_grad_(), of_rank(distributed.get_rank()).requires_grad_()
    expected, actual = function(plain), torch.compile(function, backend="aot_eager", fullgraph=True)(fast)
    torch.testing.assert_close(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    torch.testing.assert_close(fast.grad, plain.grad)


@pytest.mark.parametrize("function", [every_pair, uneven_exchange, uneven_parts, in_other_precisions, compiled])
def test_two_ranks(function: Callable[[], None]) -> None:
    run(2, function)


def test_without_a_group_nothing_happens() -> None:
    x = of_rank(0)
    for function in (collectives.copy_to, collectives.reduce_from, collectives.all_to_all):
        assert function(x, None) is x
    for function in (collectives.gather_from, collectives.scatter_to, collectives.join_from):
        assert function(x, None, 1) is x
