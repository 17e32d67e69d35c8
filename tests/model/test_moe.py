"""Mixtures of experts: against transformers, their losses against formulas, capacity, statistics, recomputation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tessel.config.experts import Experts as ExpertOptions
from tessel.config.run import Kernels as KernelOptions
from tessel.model import moe
from tessel.model.balance import LOAD_BALANCING_LOSS, MAX_LOAD, Z_LOSS, Balance, RouterOptions
from tessel.model.config import ModelConfig
from tessel.model.moe import MixtureOfExperts, grouped_linear
from tessel.model.recompute import Recompute
from tessel.model.transformer import Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
SHARED = {**QWEN, "shared_expert_intermediate_size": 40}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", SHARED),
    "qwen2_moe normalised, dense layers": ("Qwen2Moe", {**SHARED, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "norm_topk_prob": True, "head_dim": 16}),
    "qwen3_moe every second layer": ("Qwen3Moe", {**QWEN, "decoder_sparse_step": 2}),
}


def unfused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors by our names: it holds gate and up in one."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("gate_up_proj"):
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                found[name.replace("gate_up", part)] = half.clone()
        else:
            found[name] = tensor.clone()
    return found


def pair(prefix: str, overrides: dict[str, Any], **ours: Any) -> tuple[nn.Module, Transformer]:
    hf_config = getattr(transformers, f"{prefix}Config")(**{**SHAPE, **overrides})
    theirs = getattr(transformers, f"{prefix}ForCausalLM")(hf_config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_((1.0 if "norm" in name else 0.0) + 0.15 * torch.randn(parameter.shape))
    model = Transformer(ModelConfig.from_hf(hf_config.to_dict()), **ours)
    model.load_state_dict(unfused({name: p.detach() for name, p in theirs.named_parameters()}), strict=True)
    return theirs.train(), model.train()


def shifted(tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    weights_BS = torch.ones(tokens_BS.shape)
    weights_BS[:, -1] = 0
    return tokens_BS.roll(-1, dims=1), weights_BS / weights_BS.sum()


@pytest.fixture
def tokens_BS() -> Tensor:
    return torch.randint(0, 307, (3, 37))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_transformers(
    case: str, grouped: bool, tokens_BS: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not grouped:
        monkeypatch.setattr(moe, "_has_grouped", lambda device, dtype: False)
    theirs, ours = pair(*CASES[case])
    their_logits = theirs(tokens_BS, use_cache=False).logits
    assert their_logits.std() > 0.05, "the case would prove nothing"
    assert (ours(tokens_BS) - their_logits).abs().max() < 1e-5
    their_loss = theirs(tokens_BS, labels=tokens_BS, use_cache=False).loss
    labels_BS, weights_BS = shifted(tokens_BS)
    our_loss = ours(tokens_BS, labels_BS=labels_BS, weights_BS=weights_BS)
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    their_loss.backward()
    our_loss.backward()
    expected = unfused({name: p.grad for name, p in theirs.named_parameters()})
    assert expected.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert ((parameter.grad - expected[name]).norm() / expected[name].norm()).item() < 1e-5, name


def test_the_auxiliary_loss_of_transformers(tokens_BS: Tensor) -> None:
    """transformers sums over the K choices and takes all layers together: K times ours, for one layer."""
    overrides = {"num_local_experts": 5, "num_experts_per_tok": 2, "num_hidden_layers": 1, "output_router_logits": True}
    options = RouterOptions(level="aux_loss", aux_loss_coeff=0.02)
    theirs, ours = pair("Mixtral", {**overrides, "router_aux_loss_coef": 0.01})
    out = theirs(tokens_BS, labels=tokens_BS, use_cache=False)
    out.loss.backward()
    ours.balance.options = options
    labels_BS, weights_BS = shifted(tokens_BS)
    ours(tokens_BS, labels_BS=labels_BS, weights_BS=weights_BS).backward()
    figures = ours.balance.figures(ours.balance.take(torch.device("cpu")), 1)
    assert figures[LOAD_BALANCING_LOSS] == pytest.approx(out.aux_loss.item() / 2, rel=1e-6)
    name = "model.layers.0.mlp.gate.weight"
    expected = dict(theirs.named_parameters())[name].grad
    torch.testing.assert_close(dict(ours.named_parameters())[name].grad, expected, rtol=1e-5, atol=1e-7)


def config_of(**more: Any) -> ModelConfig:
    return ModelConfig.from_hf({**SHAPE, "model_type": "mixtral", "num_local_experts": 4, **more})


def mixture(options: RouterOptions, **more: Any) -> tuple[MixtureOfExperts, Balance]:
    config = config_of(**more)
    balance = Balance(config, options)
    layer = MixtureOfExperts(config, 1, balance)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer, balance


def plain(layer: MixtureOfExperts, x_BSE: Tensor, weights_TX: Tensor) -> Tensor:
    """Every expert on every token, weighted: the definition."""
    experts, x_TE = layer.experts, x_BSE.flatten(0, 1)
    out_TE = torch.zeros_like(x_TE)
    for number in range(len(experts.gate_proj)):
        inner = F.silu(x_TE @ experts.gate_proj[number].T) * (x_TE @ experts.up_proj[number].T)
        out_TE = out_TE + weights_TX[:, number, None] * (inner @ experts.down_proj[number].T)
    return out_TE.view(x_BSE.shape)


def chosen(scores_TX: Tensor, topk: int) -> Tensor:
    return torch.zeros_like(scores_TX, dtype=torch.bool).scatter(1, scores_TX.topk(topk, dim=1).indices, True)


def losses_by_hand(options: RouterOptions, logits_BSX: Tensor, chosen_BSX: Tensor, scores_BSX: Tensor) -> Tensor:
    num_experts, topk = logits_BSX.shape[-1], int(chosen_BSX[0, 0].sum())
    if options.level == "seq_aux_loss":
        shares = [c.float().mean(0) / topk * s.mean(0) for c, s in zip(chosen_BSX, scores_BSX, strict=True)]
        loss = torch.stack(shares).sum(1).mean()
    else:
        loss = (chosen_BSX.float().flatten(0, 1).mean(0) / topk * scores_BSX.flatten(0, 1).mean(0)).sum()
    z_loss = logits_BSX.logsumexp(-1).square().mean()
    return options.aux_loss_coeff * num_experts * loss + options.z_loss_coeff * z_loss


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("level", ["aux_loss", "seq_aux_loss", "global_aux_loss", "none"])
def test_losses_enter_as_their_formulas_say(level: str, score: str) -> None:
    options = RouterOptions(level, 0.3 if level != "none" else 0.0, 0.2)
    layer, balance = mixture(options, scoring_func=score)
    x_BSE = torch.randn(2, 9, 32, requires_grad=True)
    balance.start_step(0.25)
    upstream = torch.randn(2, 9, 32)
    (layer(x_BSE) * upstream).sum().backward()
    actual = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    x_grad, x_BSE.grad = x_BSE.grad.clone(), None
    layer.zero_grad()
    logits_BSX = x_BSE @ layer.gate.weight.T
    if score == "softmax":
        scores_BSX = logits_BSX.softmax(-1)
    else:
        scores_BSX = logits_BSX.sigmoid() / logits_BSX.sigmoid().sum(-1, keepdim=True)
    chosen_BSX = chosen(logits_BSX.flatten(0, 1), 2).view(logits_BSX.shape)
    kept_TX = (scores_BSX * chosen_BSX).flatten(0, 1)
    out_BSE = plain(layer, x_BSE, kept_TX / kept_TX.sum(1, keepdim=True))
    loss = losses_by_hand(options, logits_BSX, chosen_BSX, scores_BSX)
    ((out_BSE * upstream).sum() + 0.25 * loss).backward()
    torch.testing.assert_close(x_grad, x_BSE.grad, rtol=1e-5, atol=1e-5)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)
    sums_LR = balance.take(torch.device("cpu"))
    assert sums_LR.shape == (3, 6) and not sums_LR[[0, 2]].any(), "the layer is number 1 of 3"
    assert torch.equal(sums_LR[1, 2:], chosen_BSX.flatten(0, 1).sum(0).float())
    coefficients = torch.tensor([options.aux_loss_coeff, options.z_loss_coeff])
    assert (sums_LR[1, :2] * coefficients).sum().item() == pytest.approx(loss.item(), rel=1e-5)
    assert not balance.take(torch.device("cpu")).any(), "taking starts anew"


def test_the_global_loss_looks_at_all_of_the_step_so_far() -> None:
    layer, balance = mixture(RouterOptions("global_aux_loss", 0.3))
    first, second = torch.randn(1, 8, 32), torch.randn(1, 8, 32)
    balance.start_step(1.0)
    for x_BSE in (first, second):
        layer(x_BSE).sum().backward()
    both = balance.take(torch.device("cpu"))[1, 0].item()
    shares, scores = [], []
    for x_BSE in (first, second):
        logits_TX = (x_BSE @ layer.gate.weight.T).flatten(0, 1)
        shares.append(chosen(logits_TX, 2).float().mean(0) / 2)
        scores.append(logits_TX.softmax(-1).mean(0))
    expected = 4 * ((shares[0] * scores[0]).sum() + ((shares[0] + shares[1]) / 2 * scores[1]).sum())
    assert both == pytest.approx(expected.item(), rel=1e-5)
    balance.start_step(1.0)
    layer(second).sum().backward()
    assert balance.take(torch.device("cpu"))[1, 0].item() == pytest.approx(4 * (shares[1] * scores[1]).sum().item())


@pytest.mark.parametrize("normalised", [True, False])
def test_weights_that_need_not_add_up_to_one(normalised: bool) -> None:
    layer, _ = mixture(RouterOptions(), norm_topk_prob=normalised, routed_scaling_factor=1.5)
    x_BSE = torch.randn(2, 5, 32)
    scores_TX = (x_BSE @ layer.gate.weight.T).softmax(-1).flatten(0, 1)
    weights_TX = scores_TX * chosen(scores_TX, 2)
    if normalised:
        weights_TX = weights_TX / weights_TX.sum(1, keepdim=True)
    torch.testing.assert_close(layer(x_BSE), plain(layer, x_BSE, 1.5 * weights_TX), rtol=1e-5, atol=1e-6)


def test_the_bias_changes_the_choice_and_not_the_weights_and_follows_the_load() -> None:
    layer, balance = mixture(RouterOptions(expert_bias=True, bias_update_rate=0.1), scoring_func="sigmoid")
    assert balance.bias_LX is not None
    balance.bias_LX[1] = torch.tensor([0.0, 9.0, 0.0, 9.0])
    x_BSE = torch.randn(2, 5, 32)
    scores_TX = (x_BSE @ layer.gate.weight.T).sigmoid().flatten(0, 1)
    weights_TX = scores_TX * torch.tensor([0.0, 1.0, 0.0, 1.0])
    out_BSE = layer(x_BSE)
    expected = plain(layer, x_BSE, weights_TX / weights_TX.sum(1, keepdim=True))
    torch.testing.assert_close(out_BSE, expected, rtol=1e-5, atol=1e-6)
    out_BSE.sum().backward()
    balance.update_bias(balance.take(torch.device("cpu")))
    torch.testing.assert_close(balance.bias_LX[1], torch.tensor([0.1, 8.9, 0.1, 8.9]))
    assert not balance.bias_LX[0].any(), "a layer without tokens is even"


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_tokens_beyond_the_capacity_are_dropped(policy: str) -> None:
    layer, _ = mixture(RouterOptions(capacity_factor=0.6, drop_policy=policy))
    x_BSE = torch.randn(2, 10, 32)
    logits_TX = (x_BSE @ layer.gate.weight.T).flatten(0, 1)
    weights_TX = (logits_TX.softmax(-1) * chosen(logits_TX, 2)).detach()
    weights_TX = weights_TX / weights_TX.sum(1, keepdim=True)
    capacity = math.ceil(20 * 2 / 4 * 0.6)
    places = torch.arange(20).view(2, 10)
    by_position = places.t().flatten()
    dropped = 0
    for number in range(4):
        tokens = weights_TX[:, number].nonzero().flatten()
        if policy == "probs":
            order = tokens[weights_TX[tokens, number].argsort(descending=True)]
        else:
            order = torch.tensor([t for t in by_position.tolist() if t in tokens.tolist()])
        weights_TX[order[capacity:], number] = 0
        dropped += max(len(order) - capacity, 0)
    assert dropped > 0, "nothing was over capacity, so nothing was tried"
    torch.testing.assert_close(layer(x_BSE), plain(layer, x_BSE, weights_TX), rtol=1e-5, atol=1e-6)
    layer(x_BSE).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("level", ["aux_loss", "global_aux_loss"])
@pytest.mark.parametrize("modules", [None, ("moe",), ("moe_act", "shared_experts"), ("layernorm",)])
def test_recomputing_changes_nothing_and_counts_once(
    modules: tuple[str, ...] | None, level: str, tokens_BS: Tensor
) -> None:
    raw = {**SHAPE, **SHARED, "model_type": "qwen2_moe"}
    config = ModelConfig.from_hf(raw)
    if modules is None:
        recompute = Recompute("full", "uniform", 1)
    else:
        recompute = Recompute("selective", modules=frozenset(modules))
    models = [Transformer(config), Transformer(config, recompute=recompute)]
    for parameter in models[0].parameters():
        nn.init.normal_(parameter, std=0.2)
    models[1].load_state_dict(models[0].state_dict())
    labels_BS, weights_BS = shifted(tokens_BS)
    sums = []
    for model in models:
        model.balance.options = RouterOptions(level, 0.1, 0.1)
        model.balance.start_step(0.5)
        for _ in range(2):
            model(tokens_BS, labels_BS=labels_BS, weights_BS=weights_BS).backward()
        sums.append(model.balance.take(torch.device("cpu")))
    assert torch.equal(*sums)
    assert sums[0][:, 2:].sum() == 2 * 3 * tokens_BS.numel() * 3
    for (name, plain_parameter), recomputed in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(plain_parameter.grad, recomputed.grad), name


def test_figures_are_means_over_layers_and_micro_batches() -> None:
    balance = Balance(config_of(), RouterOptions("aux_loss", 0.1, 0.1))
    balance.record(0, torch.tensor([1.0, 4.0]), torch.tensor([4, 0, 0, 0]))
    balance.record(0, torch.tensor([2.0, 5.0]), torch.tensor([0, 4, 0, 0]))
    balance.record(1, torch.tensor([3.0, 6.0]), torch.tensor([2, 2, 2, 2]))
    balance.record(2, torch.tensor([6.0, 3.0]), torch.tensor([2, 2, 2, 2]))
    figures = balance.figures(balance.take(torch.device("cpu")), 2)
    assert figures == pytest.approx({LOAD_BALANCING_LOSS: 2.0, Z_LOSS: 3.0, MAX_LOAD: 4 / 3})


def test_evaluation_counts_nothing(tokens_BS: Tensor) -> None:
    model = Transformer(config_of())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        model(tokens_BS)
    assert not model.balance.take(torch.device("cpu")).any()


@pytest.mark.parametrize("sizes", [(16, 24), (10, 6)])
def test_a_grouped_product_with_empty_groups(sizes: tuple[int, int]) -> None:
    inner, outer = sizes
    rows = torch.randn(7, inner, requires_grad=True)
    weight = torch.randn(4, outer, inner, requires_grad=True)
    out = grouped_linear(rows, weight, torch.tensor([0, 3, 0, 4]))
    expected = torch.cat((rows[:3] @ weight[1].T, rows[3:] @ weight[3].T))
    torch.testing.assert_close(out, expected)
    actual = torch.autograd.grad(out, (rows, weight), torch.ones_like(out))
    for one, other in zip(actual, torch.autograd.grad(expected, (rows, weight), torch.ones_like(out)), strict=True):
        torch.testing.assert_close(one, other)
    none = grouped_linear(rows[:0], weight, torch.zeros(4, dtype=torch.int64))
    assert none.shape == (0, outer)
    assert not torch.autograd.grad(none.sum(), weight)[0].any()


def test_options_from_flags() -> None:
    assert RouterOptions.from_options(ExpertOptions()) == RouterOptions()
    pai = ExpertOptions(moe_router_load_balancing_type="pai_megatron_aux_loss", moe_aux_loss_coeff=0.1)
    assert RouterOptions.from_options(pai).level == "aux_loss"
    none = ExpertOptions(moe_router_load_balancing_type="softmax_topk", moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.2)
    assert RouterOptions.from_options(none) == RouterOptions(z_loss_coeff=0.2)
    assert Recompute.from_options(KernelOptions()) is None
