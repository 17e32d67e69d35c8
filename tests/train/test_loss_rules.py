"""A step against a plain loop: both rules that weigh tokens, clipping, decay, the logged loss, evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessel.config.run import Optimizer
from tessel.data.loader import MicroBatch
from tessel.parallel.peers import Peers
from tessel.parallel.runner import PlainRunner
from tessel.train.gradients import Gradients
from tessel.train.optimizer import build_optimizer, parameter_groups
from tessel.train.step import TrainStep, evaluation_sums
from tests.train.tiny import CONFIG, VOCAB_SIZE, build_model

LR, WEIGHT_DECAY, CLIP = 1e-2, 0.1, 0.5
# Loss-bearing tokens in each sequence of 16: the rules differ, and one micro-batch has none at all.
NUM_BEARING = ((16, 16), (3, 0), (0, 0), (16, 5))


def micro_batches() -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for counts in NUM_BEARING:
        tokens_BS = torch.randint(0, VOCAB_SIZE, (2, 17), generator=generator)
        mask_BS = torch.stack([(torch.arange(16) < count).float() for count in counts])
        positions_BS = torch.arange(16).expand(2, 16)
        batches.append(MicroBatch(tokens_BS[:, :-1], tokens_BS[:, 1:].contiguous(), mask_BS, positions_BS, None))
    return batches


def nll_of(model: nn.Module, batch: MicroBatch) -> Tensor:
    logits_BSV = model(batch.tokens_BS)
    return F.cross_entropy(logits_BSV.flatten(0, 1), batch.labels_BS.flatten(), reduction="none").view(2, 16)


def mean_of_means(model: nn.Module) -> Tensor:
    means = []
    for batch in micro_batches():
        total = (nll_of(model, batch) * batch.loss_mask_BS).sum()
        means.append(total / batch.loss_mask_BS.sum().clamp(min=1))
    return torch.stack(means).mean()


def mean_over_tokens(model: nn.Module) -> Tensor:
    sums = [(nll_of(model, batch) * batch.loss_mask_BS).sum() for batch in micro_batches()]
    return torch.stack(sums).sum() / sum(batch.loss_mask_BS.sum() for batch in micro_batches())


@pytest.mark.parametrize(("per_token_loss", "loss_of"), [(False, mean_of_means), (True, mean_over_tokens)])
def test_step_equals_a_plain_loop(per_token_loss: bool, loss_of: Callable[[nn.Module], Tensor]) -> None:
    ours, plain = build_model(), build_model()
    options = Optimizer(lr=LR, weight_decay=WEIGHT_DECAY, adam_beta2=0.95)
    optimizer = build_optimizer(parameter_groups(ours.named_parameters(), CONFIG, options), options)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = LR, WEIGHT_DECAY * group["wd_mult"]
    step = TrainStep(
        PlainRunner(ours),
        optimizer,
        Gradients(dict(ours.named_parameters())),
        Peers(),
        scaler=None,
        clip_grad=CLIP,
        per_token_loss=per_token_loss,
        z_loss_coeff=0.0,
        count_zeros=False,
        skip_not_finite=False,
    )
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), foreach=False, fused=False)
    for _ in range(3):
        logged = mean_over_tokens(plain).item()
        reference.zero_grad()
        loss_of(plain).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        reference.step()
        result = step(micro_batches())
        assert result.loss == pytest.approx(logged, rel=1e-6)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert norm > CLIP, "the clip must bite for this test to say something"
    for (name, ours_p), plain_p in zip(ours.named_parameters(), plain.parameters(), strict=True):
        # A key's bias adds the same to every score of a query: its gradient is rounding, which Adam magnifies.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(ours_p, plain_p, rtol=1e-4, atol=1e-6, msg=name)


def test_the_rules_differ_on_uneven_masks() -> None:
    model = build_model()
    assert abs(mean_of_means(model).item() - mean_over_tokens(model).item()) > 0.1


def test_evaluation_is_the_sum_over_loss_bearing_tokens() -> None:
    model = build_model()
    nll_sum, num_tokens = evaluation_sums(PlainRunner(copy.deepcopy(model)), micro_batches())
    assert num_tokens == sum(sum(counts) for counts in NUM_BEARING)
    assert nll_sum / num_tokens == pytest.approx(mean_over_tokens(model).item(), rel=1e-6)
