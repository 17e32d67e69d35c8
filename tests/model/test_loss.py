"""The chunked loss: values, gradients, precisions, and what it allocates."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tessel.model.loss import chunked_linear_cross_entropy, chunked_nll, default_chunk_tokens

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(num_tokens: int, vocab: int, hidden: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """(hidden, weight, labels, weights); a third of the tokens have weight 0 and a label out of range."""
    hidden_ND = torch.randn(num_tokens, hidden).to(dtype).requires_grad_()
    weight_VD = (torch.randn(vocab, hidden) * 0.5).to(dtype).requires_grad_()
    labels_N = torch.randint(0, vocab, (num_tokens,))
    weights_N = torch.rand(num_tokens)
    weights_N[::3] = 0
    labels_N[::3] = -100
    return hidden_ND, weight_VD, labels_N, weights_N


def reference(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, weights_N: Tensor, z: float) -> Tensor:
    """The same in the plainest way, in the precision of its inputs."""
    logits_NV = hidden_ND @ weight_VD.t()
    nll_N = F.cross_entropy(logits_NV, labels_N, reduction="none", ignore_index=-100)
    return (weights_N * (nll_N + z * logits_NV.logsumexp(dim=-1).square())).sum()


def true_gradients(inputs: Inputs) -> list[Tensor]:
    """Gradients of hidden and weight in double precision, unrounded."""
    exact = [x.detach().double().requires_grad_() for x in inputs[:2]]
    return gradients_of(reference(exact[0], exact[1], inputs[2], inputs[3].double(), 0.0), *exact)


def gradients_of(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 7, 16, 50, 4096, None])
def test_values_and_gradients(chunk: int | None, z: float) -> None:
    inputs = make_inputs(50, 31, 12)
    expected = reference(*(x.double() for x in inputs[:2]), inputs[2], inputs[3].double(), z)
    actual = chunked_linear_cross_entropy(*inputs, chunk_tokens=chunk, z_loss_coeff=z).sum()
    assert actual.dtype == torch.float32 and actual.shape == ()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    pairs = zip(gradients_of(actual, *inputs[:2]), gradients_of(expected, *inputs[:2]), strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    assert chunked_nll(*inputs[:2], inputs[2].clamp(min=0), chunk).shape == (50,)


def test_against_cross_entropy() -> None:
    hidden_ND, weight_VD, labels_N, _ = make_inputs(64, 100, 8)
    labels_N = labels_N.clamp(min=0)
    ours = chunked_linear_cross_entropy(hidden_ND, weight_VD, labels_N, torch.full((64,), 1 / 64), chunk_tokens=10)
    theirs = F.cross_entropy(hidden_ND @ weight_VD.t(), labels_N)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    nll_N = chunked_nll(hidden_ND, weight_VD, labels_N, 10)
    expected = F.cross_entropy(hidden_ND @ weight_VD.t(), labels_N, reduction="none")
    torch.testing.assert_close(nll_N, expected, rtol=1e-5, atol=1e-6)


def test_upstream_gradient_scales() -> None:
    inputs = make_inputs(20, 31, 12)
    once = gradients_of(chunked_linear_cross_entropy(*inputs, chunk_tokens=6), *inputs[:2])
    thrice = gradients_of(3 * chunked_linear_cross_entropy(*inputs, chunk_tokens=6), *inputs[:2])
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * one, three)


def test_backward_works_once() -> None:
    loss = chunked_linear_cross_entropy(*make_inputs(20, 31, 12))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="works once"):
        loss.backward()


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_gradients_asked_for(frozen: int) -> None:
    inputs = make_inputs(20, 31, 12)
    expected = gradients_of(chunked_linear_cross_entropy(*inputs), *inputs[:2])
    inputs[frozen].requires_grad_(False)
    chunked_linear_cross_entropy(*inputs).backward()
    assert inputs[frozen].grad is None
    assert torch.equal(inputs[1 - frozen].grad, expected[1 - frozen])


def test_all_weights_zero() -> None:
    hidden_ND, weight_VD, labels_N, weights_N = make_inputs(20, 31, 12)
    loss = chunked_linear_cross_entropy(hidden_ND, weight_VD, labels_N, weights_N * 0, chunk_tokens=6)
    loss.backward()
    assert loss.item() == 0
    assert not hidden_ND.grad.any() and not weight_VD.grad.any()


def test_extreme_logits_stay_finite() -> None:
    hidden_ND = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    weight_VD = torch.tensor([[10.0, 0.0], [-10.0, 0.0], [0.0, -10.0]])
    nll_N = chunked_nll(hidden_ND, weight_VD, torch.tensor([1, 2]))
    torch.testing.assert_close(nll_N, torch.tensor([2000.0, 1000.0 + torch.log(torch.tensor(2.0)).item()]))


def test_bf16_is_no_worse_than_cross_entropy_on_its_logits() -> None:
    errors = [0.0, 0.0]
    for seed in range(5):
        torch.manual_seed(seed)
        inputs = make_inputs(96, 300, 32, torch.bfloat16)
        hidden_ND, weight_VD, labels_N, weights_N = inputs
        truth = true_gradients(inputs)
        plain_N = F.cross_entropy((hidden_ND @ weight_VD.t()).float(), labels_N, reduction="none")
        ours = chunked_linear_cross_entropy(*inputs, chunk_tokens=16)
        assert ours.item() == pytest.approx((weights_N * plain_N).sum().item(), rel=1e-6)
        for who, loss in enumerate(((weights_N * plain_N).sum(), ours)):
            for gradient, true in zip(gradients_of(loss, *inputs[:2]), truth, strict=True):
                assert gradient.dtype == torch.bfloat16
                errors[who] += ((gradient - true).square().sum() / true.square().sum()).item()
    assert (errors[1] / errors[0]) ** 0.5 <= 1.1


def test_fp16_with_the_loss_scale_in_the_weights() -> None:
    """Gradients too small for fp16 arrive, those too large overflow, as with a scaled loss in Megatron."""
    hidden_ND, weight_VD, labels_N, _ = make_inputs(64, 500, 16, torch.float16)
    labels_N = labels_N.clamp(min=0)
    weights_N = torch.full((64,), 1e-6)  # the logits' gradients are below fp16's smallest number
    inputs = (hidden_ND, weight_VD)
    truth = true_gradients((*inputs, labels_N, weights_N))

    def ours(scale: float) -> list[Tensor]:
        loss = chunked_linear_cross_entropy(*inputs, labels_N, weights_N * scale, chunk_tokens=16)
        assert loss.item() / scale == pytest.approx(ours_unscaled, rel=1e-6)
        return gradients_of(loss, *inputs)

    ours_unscaled = chunked_linear_cross_entropy(*inputs, labels_N, weights_N).item()
    for gradient, true in zip(ours(2.0**16), truth, strict=True):
        assert gradient.dtype == torch.float16
        assert (gradient.double() / 2**16 - true).norm() < 2e-3 * true.norm()
    lost = (ours(1.0)[1].double() - truth[1]).norm() / truth[1].norm()
    assert lost > 0.02, "without a scale the small gradients are gone"
    overflowing = chunked_linear_cross_entropy(*inputs, labels_N, torch.full((64,), 2.0**32 / 64), chunk_tokens=16)
    assert overflowing.isfinite()
    assert all(not gradient.isfinite().all() for gradient in gradients_of(overflowing, *inputs))


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made under it that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._track(tensor.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or storage.nbytes() == 0:
            return
        self._known[key] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live_bytes -= self._known.pop(key)


def peak_bytes(loss_of: Callable[..., Tensor], num_tokens: int, vocab: int, backward: bool = True) -> int:
    """Peak of what forward and backward allocate, less the gradients of hidden and weight, which are results."""
    inputs = make_inputs(num_tokens, vocab, 8)
    with LiveBytes() as tracker:
        loss = loss_of(*inputs)
        if backward:
            loss.backward()
        else:
            del loss
    return tracker.peak_bytes - (sum(x.nbytes for x in inputs[:2]) if backward else 0)


def test_peak_memory_is_independent_of_tokens_times_vocabulary() -> None:
    def chunked(*inputs: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(*inputs, chunk_tokens=64)

    def whole(*inputs: Tensor) -> Tensor:
        return reference(*inputs, 0.0)

    vocab, logits_bytes = 2000, 64 * 2000 * 4
    assert peak_bytes(whole, 4096, vocab) > 2 * 4096 * vocab * 4, "the meter sees what it should"
    short, long = peak_bytes(chunked, 256, vocab), peak_bytes(chunked, 8192, vocab)
    assert logits_bytes < short < 2.2 * logits_bytes
    # 32 times the tokens: only per-token vectors and a hidden-sized product grow.
    assert long - short < 8192 * 8 * 16
    with torch.no_grad():
        assert peak_bytes(chunked, 8192, vocab, backward=False) < 2.2 * logits_bytes + 8192 * 8 * 16


def test_default_chunk_depends_on_the_vocabulary_alone() -> None:
    cpu = torch.device("cpu")
    assert default_chunk_tokens(32000, cpu) * 32000 * 4 <= 64 * 2**20
    assert default_chunk_tokens(512, cpu) == 8192
    assert default_chunk_tokens(151936, cpu) == 256


def test_the_model_never_holds_the_logits(pair: Any) -> None:
    _, ours, config = pair("Qwen2", vocab_size=4001, num_hidden_layers=1, ours={"loss_chunk_tokens": 16})
    tokens_BS = torch.randint(0, 4001, (2, 128))
    with LiveBytes() as tracker:
        ours(tokens_BS, labels_BS=tokens_BS, weights_BS=torch.ones(2, 128)).backward()
    logits_bytes = tokens_BS.numel() * config.vocab_size * 4
    assert tracker.peak_bytes < logits_bytes
    biggest = max(nn.utils.parameters_to_vector(ours.parameters()).nbytes, 1)
    assert tracker.peak_bytes > biggest / 2


def test_one_of_the_two_terms_alone_has_no_gradient_of_its_own() -> None:
    loss = chunked_linear_cross_entropy(*make_inputs(20, 31, 12), z_loss_coeff=1e-2)
    with pytest.raises(RuntimeError, match="minimise their sum"):
        loss[0].backward()


def test_the_two_gradients_one_after_the_other() -> None:
    """As a pipeline's split backward asks for them: first that of the hidden states, then that of the weight."""
    inputs = make_inputs(20, 31, 12)
    expected = gradients_of(chunked_linear_cross_entropy(*inputs), *inputs[:2])
    loss = chunked_linear_cross_entropy(*inputs)
    (hidden_grad,) = torch.autograd.grad(loss, inputs[0], retain_graph=True)
    (weight_grad,) = torch.autograd.grad(loss, inputs[1])
    assert torch.equal(hidden_grad, expected[0]) and torch.equal(weight_grad, expected[1])


@dataclass
class Meeting:
    """Where the parts of a vocabulary, each on a thread of its own, put what they gather."""

    num_parts: int
    tensors: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.num_parts, timeout=30)
        self.tensors = [None] * self.num_parts


@dataclass
class Part:
    number: int
    first: int
    num_rows: int
    meeting: Meeting

    def gather(self, x: Tensor) -> Tensor:
        self.meeting.tensors[self.number] = x
        self.meeting.barrier.wait()
        gathered = torch.stack([tensor for tensor in self.meeting.tensors if tensor is not None])
        self.meeting.barrier.wait()
        return gathered

    def join(self, logits_BSV: Tensor) -> Tensor:
        raise AssertionError("the loss never holds the logits")


def in_parts(inputs: Inputs, sizes: list[int], **options: Any) -> list[tuple[Tensor, list[Tensor | None], Tensor]]:
    """For each part (loss, gradients of hidden and of its padded rows, nll); all have as many rows as the first."""
    meeting = Meeting(len(sizes))

    def one(number: int) -> tuple[Tensor, list[Tensor | None], Tensor]:
        torch.set_num_threads(1)
        hidden_ND, weight_VD, labels_N, weights_N = inputs
        part = Part(number, sum(sizes[:number]), sizes[number], meeting)
        own_VD = weight_VD.new_zeros(sizes[0], weight_VD.shape[1])
        own_VD[: part.num_rows] = weight_VD.detach()[part.first : part.first + part.num_rows]
        leaves = [
            x.detach().clone().requires_grad_(old.requires_grad)
            for x, old in ((hidden_ND, hidden_ND), (own_VD, weight_VD))
        ]
        loss = chunked_linear_cross_entropy(*leaves, labels_N, weights_N, part=part, **options)
        loss.sum().backward()
        nll_N = chunked_nll(*leaves, labels_N.clamp(min=0), options.get("chunk_tokens"), part)
        return loss.detach(), [leaf.grad for leaf in leaves], nll_N

    with ThreadPoolExecutor(len(sizes)) as pool:
        return list(pool.map(one, range(len(sizes))))


@pytest.mark.parametrize("sizes", [[16, 15], [8, 8, 8, 7], [30, 1]])
@pytest.mark.parametrize("z", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [7, 50])
def test_a_vocabulary_in_parts(sizes: list[int], z: float, chunk: int) -> None:
    inputs = make_inputs(50, 31, 12)
    whole = chunked_linear_cross_entropy(*inputs, chunk_tokens=chunk, z_loss_coeff=z)
    hidden_grad, weight_grad = gradients_of(whole.sum(), *inputs[:2])
    nll_N = chunked_nll(*inputs[:2], inputs[2].clamp(min=0), chunk)
    parts = in_parts(inputs, sizes, chunk_tokens=chunk, z_loss_coeff=z)
    for loss, _, part_nll_N in parts:
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
        assert torch.equal(loss, parts[0][0]), "every part has the same loss"
        torch.testing.assert_close(part_nll_N, nll_N, rtol=1e-5, atol=1e-6)
    summed = torch.stack([gradients[0] for _, gradients, _ in parts]).sum(dim=0)
    assert (summed - hidden_grad).norm() <= 1e-6 * hidden_grad.norm()
    rows = [gradients[1][:size] for (_, gradients, _), size in zip(parts, sizes, strict=True)]
    assert (torch.cat(rows) - weight_grad).norm() <= 1e-6 * weight_grad.norm()
    assert all(not gradients[1][size:].any() for (_, gradients, _), size in zip(parts, sizes, strict=True)), "padding"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_in_low_precision_are_as_near_as_the_whole(dtype: torch.dtype) -> None:
    inputs = make_inputs(96, 301, 32, dtype)
    truth = true_gradients(inputs)
    whole = chunked_linear_cross_entropy(*inputs, chunk_tokens=16)
    parts = in_parts(inputs, [151, 150], chunk_tokens=16)
    ours = [
        sum(p[1][0].float() for p in parts),
        torch.cat([p[1][1][:size] for p, size in zip(parts, (151, 150), strict=True)]),
    ]
    assert parts[0][0].item() == pytest.approx(whole.item(), rel=1e-6)
    for gradient, other, true in zip(ours, gradients_of(whole, *inputs[:2]), truth, strict=True):
        assert (gradient - true).norm() <= 1.2 * (other - true).norm()


@pytest.mark.parametrize("frozen", [0, 1])
def test_parts_compute_only_the_gradients_asked_for(frozen: int) -> None:
    inputs = make_inputs(20, 31, 12)
    expected = [gradients for _, gradients, _ in in_parts(inputs, [16, 15])]
    inputs[frozen].requires_grad_(False)
    for (_, gradients, _), both in zip(in_parts(inputs, [16, 15]), expected, strict=True):
        assert gradients[frozen] is None
        assert torch.equal(gradients[1 - frozen], both[1 - frozen])


def test_parts_with_extreme_logits_stay_finite() -> None:
    hidden_ND = torch.tensor([[100.0, 0.0], [0.0, 100.0]], requires_grad=True)
    weight_VD = torch.tensor([[10.0, 0.0], [-10.0, 0.0], [0.0, -10.0]], requires_grad=True)
    inputs = (hidden_ND, weight_VD, torch.tensor([1, 2]), torch.ones(2))
    whole = chunked_linear_cross_entropy(*inputs)
    expected = gradients_of(whole, hidden_ND)[0]
    parts = in_parts(inputs, [2, 1])
    torch.testing.assert_close(parts[0][0], whole)
    torch.testing.assert_close(sum(gradients[0] for _, gradients, _ in parts), expected)
