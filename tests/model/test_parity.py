"""Against transformers, on tiny random models: logits, loss, gradients, training, bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_YARN_ALL = {**_YARN, "beta_fast": 20, "beta_slow": 2, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 head_dim": ("Qwen2", {"head_dim": 12}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": _YARN}),
    "qwen2 sliding in some layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {}),
    "qwen3 tied mha": ("Qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3 biases yarn": ("Qwen3", {"attention_bias": True, "rope_parameters": _YARN_ALL}),
    "qwen3 layer types": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "llama mha": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama linear odd vocabulary": ("Llama", {"rope_parameters": _LINEAR, "vocab_size": 311, "head_dim": 6}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"head_dim": 16}),
    "mistral sliding": ("Mistral", {"sliding_window": 8}),
    "mistral sliding, not reached": ("Mistral", {"sliding_window": 64, "num_key_value_heads": 4}),
    "mistral yarn": ("Mistral", {"rope_parameters": {**_YARN, "attention_factor": 1.3}}),
}


def shifted(tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    """(labels, weights) of next-token prediction: the mean over all but each last position."""
    weights_BS = torch.ones(tokens_BS.shape)
    weights_BS[:, -1] = 0
    labels_BS = tokens_BS.roll(-1, dims=1)
    labels_BS[:, -1] = -100
    return labels_BS, weights_BS / weights_BS.sum()


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case: str, pair: Any, tokens_BS: Tensor) -> None:
    prefix, overrides = CASES[case]
    theirs, ours, _ = pair(prefix, **overrides)
    their_logits = theirs(tokens_BS, use_cache=False).logits
    assert their_logits.std() > 0.05, "the case would prove nothing"
    assert (ours(tokens_BS) - their_logits).abs().max() < 1e-5
    their_loss = theirs(tokens_BS, labels=tokens_BS, use_cache=False).loss
    labels_BS, weights_BS = shifted(tokens_BS)
    our_loss = ours(tokens_BS, labels_BS=labels_BS, weights_BS=weights_BS)
    assert our_loss.dtype == torch.float32
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    their_loss.backward()
    our_loss.backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert their_gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, their_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("case", ["qwen2", "qwen3 tied mha", "llama3", "mistral sliding"])
def test_twenty_steps_of_adamw(case: str, pair: Any) -> None:
    prefix, overrides = CASES[case]
    theirs, ours, _ = pair(prefix, **overrides)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1) for model in (theirs, ours)]
    losses: list[list[float]] = [[], []]
    for step in range(20):
        tokens_BS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(step))
        labels_BS, weights_BS = shifted(tokens_BS)
        both = (
            theirs(tokens_BS, labels=tokens_BS, use_cache=False).loss,
            ours(tokens_BS, labels_BS=labels_BS, weights_BS=weights_BS),
        )
        for loss, optimizer, history in zip(both, optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.5, "nothing was learnt, so nothing was compared"
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "llama3", "mistral sliding"])
def test_bf16_is_no_worse_than_transformers(case: str, pair: Any) -> None:
    """Distance of the bf16 logits and gradients from those of the same (rounded) weights in fp32, over some models."""
    prefix, overrides = CASES[case]
    errors = {"logits": [0.0, 0.0], "gradients": [0.0, 0.0]}
    for seed in range(4):
        tokens_BS = torch.randint(0, 307, (4, 48), generator=torch.Generator().manual_seed(seed))
        labels_BS, weights_BS = shifted(tokens_BS)
        theirs, ours, _ = pair(prefix, seed=seed, **overrides)
        for model in (theirs, ours):
            model.to(torch.bfloat16)
        truth = theirs.float()
        true_logits = truth(tokens_BS, use_cache=False).logits
        truth(tokens_BS, labels=tokens_BS, use_cache=False).loss.backward()
        true_gradients = {name: parameter.grad.clone() for name, parameter in truth.named_parameters()}
        truth.zero_grad()
        theirs = truth.to(torch.bfloat16)
        theirs(tokens_BS, labels=tokens_BS, use_cache=False).loss.backward()
        ours(tokens_BS, labels_BS=labels_BS, weights_BS=weights_BS).backward()
        logits = (theirs(tokens_BS, use_cache=False).logits, ours(tokens_BS))
        for who, (model, model_logits) in enumerate(zip((theirs, ours), logits, strict=True)):
            errors["logits"][who] += (model_logits.float() - true_logits).square().sum().item()
            for name, parameter in model.named_parameters():
                error = (parameter.grad.float() - true_gradients[name]).square().sum()
                errors["gradients"][who] += (error / true_gradients[name].square().sum()).item()
    for what, (their_square, our_square) in errors.items():
        assert their_square > 0
        assert (our_square / their_square) ** 0.5 <= 1.1, what


def test_positions_move_the_rotation(pair: Any, tokens_BS: Tensor) -> None:
    theirs, ours, _ = pair("Llama", rope_parameters=_LLAMA3)
    positions_BS = torch.arange(37).expand(3, -1) + torch.tensor([[0], [3], [40]])
    positions_BS = positions_BS + (torch.arange(37) > 20) * 7
    expected = theirs(tokens_BS, position_ids=positions_BS, use_cache=False, attention_mask=None).logits
    # transformers reads a jump in the positions as the start of another sequence; jump for it by a mask instead.
    mask = torch.ones(37, 37, dtype=torch.bool).tril().expand(3, 1, 37, 37)
    expected = theirs(tokens_BS, position_ids=positions_BS, attention_mask=mask, use_cache=False).logits
    assert (ours(tokens_BS, positions_BS) - expected).abs().max() < 1e-5
    assert (ours(tokens_BS) - expected).abs().max() > 1e-3


def test_per_token_nll_and_last_logits(pair: Any, tokens_BS: Tensor) -> None:
    _, ours, _ = pair("Qwen2")
    labels_BS, weights_BS = shifted(tokens_BS)
    labels_BS[:, -1] = 0
    nll_BS = ours.per_token_nll(tokens_BS, labels_BS)
    logits_BSV = ours(tokens_BS)
    expected = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none")
    assert nll_BS.dtype == torch.float32 and nll_BS.shape == tokens_BS.shape and not nll_BS.requires_grad
    torch.testing.assert_close(nll_BS.flatten(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        ours(tokens_BS, logits=torch.tensor([tokens_BS.shape[1] - 1])), logits_BSV[:, -1:], rtol=0, atol=1e-6
    )
    with torch.no_grad():
        loss = ours(tokens_BS, labels_BS=labels_BS, weights_BS=weights_BS)
    assert loss.item() == pytest.approx((nll_BS * weights_BS).sum().item(), rel=1e-6)
