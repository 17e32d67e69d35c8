"""One process against transformers and torch: logits, gradients, updates, and a curve of losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.mindspore.built import batch, build

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
}


def reference_loss(model: Any, tokens: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logits = model(tokens).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (nll * weights.flatten()).sum()


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_those_of_transformers(name: str, tiny_hf_folder: Callable[..., Path]) -> None:
    family, changes = MODELS[name]
    folder = tiny_hf_folder(family, **changes)
    learner, micro = build(folder), batch()
    weights = micro.loss_mask_BS / micro.loss_mask_BS.sum()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference.config._attn_implementation = "eager"
    decoder = learner.runner.decoder
    logits = torch.from_numpy(decoder.logits(decoder.inputs(micro, weights)).asnumpy())
    assert (logits - reference(micro.tokens_BS).logits).abs().max() < 1e-5
    loss = reference_loss(reference, micro.tokens_BS, micro.labels_BS, weights)
    loss.backward()
    assert abs(float(learner.runner.train([micro], [weights])) - float(loss)) < 1e-5
    held = learner.gradients.held
    expected = {key: parameter.grad for key, parameter in reference.named_parameters()}
    assert held.keys() == expected.keys()
    for key, gradient in expected.items():
        assert np.abs(held[key].asnumpy() - gradient.numpy()).max() < 1e-6, key


def test_documents_do_not_see_each_other(tiny_hf_folder: Callable[..., Path]) -> None:
    learner, micro = build(tiny_hf_folder("qwen2")), batch(segments=True)
    decoder = learner.runner.decoder
    before = decoder.logits(decoder.inputs(micro, micro.loss_mask_BS)).asnumpy()
    changed = micro.tokens_BS.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 307
    other = type(micro)(changed, micro.labels_BS, micro.loss_mask_BS, micro.positions_BS, micro.segments_BS)
    after = decoder.logits(decoder.inputs(other, micro.loss_mask_BS)).asnumpy()
    start = int(micro.segments_BS.argmax(dim=1)[0])
    assert (before[:, start:] == after[:, start:]).all() and (before[:, :start] != after[:, :start]).any()


def test_recomputed_layers_and_a_loss_in_chunks_change_nothing(
    tiny_hf_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, micro = tiny_hf_folder("qwen3", tie_word_embeddings=True), batch()
    plain = build(folder)
    expected = plain.runner.train([micro], [micro.loss_mask_BS])
    monkeypatch.setattr("tessel.mindspore_engine.model.default_chunk_tokens", lambda *_: 20)
    learner = build(folder, "--recompute-granularity", "full", "--recompute-method", "uniform",
                    "--recompute-num-layers", "1")  # fmt: skip
    torch.testing.assert_close(learner.runner.train([micro], [micro.loss_mask_BS]), expected)
    for name, gradient in plain.gradients.held.items():
        np.testing.assert_allclose(learner.gradients.held[name].asnumpy(), gradient.asnumpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_an_update_is_torchs_on_the_same_gradients(kind: str, tiny_hf_folder: Callable[..., Path]) -> None:
    import mindspore as ms

    learner = build(tiny_hf_folder("qwen2"), "--optimizer", kind)
    group = next(group for group in learner.optimizer.param_groups if group["wd_mult"])
    group["weight_decay"] = 0.1
    names = group["names"][:2]
    start = {name: learner.weights()[name].clone() for name in names}
    theirs = [torch.nn.Parameter(start[name].clone()) for name in names]
    options: dict[str, Any] = {"lr": group["lr"], "weight_decay": 0.1}
    optimizer = (
        torch.optim.AdamW(theirs, **options) if kind == "adam" else torch.optim.SGD(theirs, momentum=0.9, **options)
    )
    for _ in range(3):
        for name, parameter in learner.weights().items():
            learner.gradients.held[name] = ms.Tensor(torch.randn_like(parameter).numpy())
        for name, parameter in zip(names, theirs, strict=True):
            parameter.grad = torch.from_numpy(learner.gradients.held[name].asnumpy().copy())
        learner.optimizer.step()
        optimizer.step()
    for name, parameter in zip(names, theirs, strict=True):
        assert (learner.weights()[name] - parameter).abs().max() < 1e-6
        assert (learner.weights()[name] - start[name]).abs().max() > 1e-3
    tensors = learner.optimizer_tensors()
    assert ("optimizer.exp_avg." + names[0] in tensors) == (kind == "adam")


def test_twenty_steps_have_the_losses_of_torch(tiny_hf_folder: Callable[..., Path]) -> None:
    folder = tiny_hf_folder("qwen2")
    learner = build(folder, "--weight-decay", "0.1", "--adam-beta2", "0.95")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decays = [p for p in reference.parameters() if p.dim() > 1]
    rest = [p for p in reference.parameters() if p.dim() == 1]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for group in learner.optimizer.param_groups:
        group["weight_decay"] *= group["wd_mult"]
    for step in range(20):
        micro = batch(seed=step % 4)
        weights = micro.loss_mask_BS / micro.loss_mask_BS.sum()
        expected = reference_loss(reference, micro.tokens_BS, micro.labels_BS, weights)
        expected.backward()
        assert abs(float(learner.runner.train([micro], [weights])) - float(expected)) < 1e-4
        norm = learner.gradients.norm()
        theirs = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        assert norm == pytest.approx(float(theirs), rel=1e-4)
        learner.gradients.clip_(1.0, norm)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
