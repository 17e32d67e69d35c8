"""Recomputed activations change no bit, dropout included, and are fewer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessel.config.memory import Memory
from tessel.config.run import Kernels as KernelOptions
from tessel.errors import UsageError
from tessel.layout.stages import stages_of
from tessel.model.balance import Balance, RouterOptions
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.layers import gated
from tessel.model.recompute import Recompute, forgetting
from tessel.model.stage import keep_stage
from tessel.model.transformer import Transformer
from tests.model.live import Live, forward_backward


def selective(*modules: str, activation_layers: int | None = 0) -> Recompute:
    return Recompute("selective", modules=frozenset(modules), activation_layers=activation_layers)


VARIANTS = {
    "core_attn": Recompute("selective"),
    "layernorm": selective("layernorm"),
    "mlp": selective("mlp"),
    "all modules": selective("core_attn", "layernorm", "mlp"),
    "layernorm and activation": selective("layernorm", activation_layers=None),
    "activation of two": Recompute(None, activation_layers=2),
    "uniform 1": Recompute("full", "uniform", 1),
    "uniform 2": Recompute("full", "uniform", 2),
    "uniform 9": Recompute("full", "uniform", 9),
    "block 2": Recompute("full", "block", 2),
    "block 2 and activation": Recompute("full", "block", 2, activation_layers=None),
    "block 9": Recompute("full", "block", 9),
}


def _step(ours: Any, tokens_BS: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    return forward_backward(ours, tokens_BS, labels_BS=tokens_BS, weights_BS=torch.ones(tokens_BS.shape))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_bitwise_equal(name: str, dropout: float, pair: Any, tokens_BS: Tensor) -> None:
    dropouts = {"attention_dropout": dropout, "hidden_dropout": dropout}
    loss, gradients, kept_bytes = _step(pair("Qwen2", ours=dropouts)[1], tokens_BS)
    again = _step(pair("Qwen2", ours={**dropouts, "recompute": VARIANTS[name]})[1], tokens_BS)
    assert torch.equal(again[0], loss)
    for parameter, gradient in gradients.items():
        assert torch.equal(again[1][parameter], gradient), parameter
    assert again[2] < kept_bytes
    without = _step(pair("Qwen2")[1], tokens_BS)[0]
    assert torch.equal(without, loss) == (dropout == 0.0)


def test_more_modules_keep_less(pair: Any, tokens_BS: Tensor) -> None:
    def kept(recompute: Recompute) -> int:
        return _step(pair("Llama", ours={"recompute": recompute})[1], tokens_BS)[2]

    activation = kept(Recompute(None, activation_layers=None))
    assert activation < kept(Recompute(None, activation_layers=2)) < kept(Recompute(None))
    assert kept(selective("layernorm", activation_layers=None)) < activation
    assert kept(selective("core_attn", "mlp", "layernorm")) < kept(selective("mlp", "layernorm"))
    assert kept(Recompute("full")) < kept(selective("core_attn", "mlp", "layernorm"))


def test_dropout_is_off_in_evaluation(pair: Any, tokens_BS: Tensor) -> None:
    _, plain, _ = pair("Qwen2")
    _, dropping, _ = pair("Qwen2", ours={"attention_dropout": 0.5, "hidden_dropout": 0.5})
    assert torch.equal(dropping.eval()(tokens_BS), plain.eval()(tokens_BS))


def test_a_forgotten_output_is_nowhere_and_comes_back_for_every_consumer() -> None:
    generator = torch.Generator().manual_seed(1)
    x, first, second = (torch.randn(64, 64, generator=generator, requires_grad=True) for _ in range(3))

    def consumer(y: Tensor) -> Tensor:
        # A view of a part of it, too.
        return F.linear(y, first).sum() + F.linear(y[8:, :32], second[:, :32]).square().sum()

    calls = 0

    def activation(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gated(x, x)

    consumer(activation(x)).backward()
    expected = [tensor.grad for tensor in (x, first, second)]
    for tensor in (x, first, second):
        tensor.grad = None
    with Live() as live:
        loss = forgetting(activation, (x,), consumer)
        # The square's input is 56 x 64; neither the activation's output nor what is inside it, 64 x 64 each.
        assert live.num_bytes < 64 * 64 * 4
    loss.backward()
    for tensor, gradient in zip((x, first, second), expected, strict=True):
        assert torch.equal(tensor.grad, gradient)
    assert calls == 3, "once without, once forward and once again"


def test_nothing_is_forgotten_where_nothing_is_kept() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(forgetting(F.silu, (x,), torch.exp), F.silu(x).exp())
    constant = torch.randn(4, 4)
    assert torch.equal(forgetting(F.silu, (constant,), torch.exp), F.silu(constant).exp())


def test_units() -> None:
    assert Recompute("full", "uniform", 2).units(5) == [(0, 2), (2, 4), (4, 5)]
    assert Recompute("full", "block", 2).units(5) == [(0, 1), (1, 2)]
    assert Recompute("selective").units(5) == []
    assert Recompute("full", "block", 1).parts(3) == [(0, 1, True), (1, 2, False), (2, 3, False)]
    assert Recompute("full", "uniform", 2).parts(0) == []


def test_no_layer_is_recomputed_as_a_whole_and_in_parts() -> None:
    recompute = Recompute("full", "block", 2, activation_layers=1)
    found = [recompute.modules_of(layer, 4) for layer in range(4)]
    assert found == [frozenset(), frozenset(), {"activation"}, frozenset()]
    assert selective("mlp", activation_layers=None).modules_of(3, 4) == {"mlp", "activation"}


def test_layers_are_counted_from_the_first_of_a_stage(pair: Any) -> None:
    whole = pair("Llama", ours={"recompute": Recompute(None, activation_layers=1)})[1]
    assert [layer.mlp.recompute_activation for layer in whole.layers.values()] == [True, False, False]
    stage = keep_stage(whole, stages_of(3, 2, layer_list=(1, 2)).stages[1])
    assert [layer.mlp.recompute_activation for layer in stage.layers.values()] == [True, False]


def test_from_options() -> None:
    assert Recompute.from_options(KernelOptions()) is None
    assert Recompute.from_options(KernelOptions(recompute_activations=True)) == Recompute("selective")
    options = KernelOptions(recompute_granularity="full", recompute_method="block", recompute_num_layers=3)
    assert Recompute.from_options(options) == Recompute("full", "block", 3)
    memory = Memory(recompute_activation_function=True)
    assert Recompute.from_options(KernelOptions(), memory) == Recompute(None, activation_layers=None)
    assert Recompute.from_options(options, memory) == Recompute("full", "block", 3, activation_layers=None)
    memory = Memory(recompute_modules=("layernorm", "mlp"))
    assert Recompute.from_options(KernelOptions(recompute_granularity="selective"), memory) == selective(
        "layernorm", "mlp"
    )


def test_options_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="needs --recompute-method; give uniform or block"):
        Recompute.from_options(KernelOptions(recompute_granularity="full"))
    with pytest.raises(UsageError, match="--recompute-num-layers 0 must be at least 1"):
        options = KernelOptions(recompute_granularity="full", recompute_method="block", recompute_num_layers=0)
        Recompute.from_options(options)
    options, memory = KernelOptions(recompute_activations=True), Memory(recompute_modules=("mlp", "moe_act", "moe"))
    with pytest.raises(UsageError, match="--recompute-modules moe moe_act is for models with experts, .* take mlp"):
        Recompute.from_options(options, memory)
    found = Recompute.from_options(options, memory, has_experts=True)
    assert found is not None and found.modules == {"mlp", "moe_act", "moe"}


EXPERTS = ModelConfig.from_hf(
    {
        "model_type": "qwen2_moe",
        "vocab_size": 307,
        "hidden_size": 32,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
)


def _experts_step(recompute: Recompute | None, tokens_BS: Tensor) -> tuple[Any, Tensor]:
    options = RouterOptions("aux_loss", aux_loss_coeff=0.01, z_loss_coeff=0.001)
    balance = Balance(EXPERTS, options)
    model = Transformer(EXPERTS, hidden_dropout=0.2, recompute=recompute, balance=balance)
    initialize_(model, EXPERTS, std=0.15, seed=1)
    balance.start_step(1.0)
    return _step(model.train(), tokens_BS), balance.take(tokens_BS.device)


@pytest.mark.parametrize(
    "recompute",
    [
        selective("moe_act"),
        selective("shared_experts"),
        selective("moe"),
        selective("mlp"),
        selective("core_attn", "layernorm", "moe_act", "shared_experts", activation_layers=None),
        Recompute("full", "block", 1, activation_layers=None),
    ],
    ids=lambda recompute: (
        "+".join(sorted(recompute.modules)) + ("" if recompute.granularity == "selective" else " full")
    ),
)
def test_a_mixture_of_experts_is_bitwise_equal(recompute: Recompute, tokens_BS: Tensor) -> None:
    """The router's losses and counts too: each once."""
    (loss, gradients, kept_bytes), sums = _experts_step(None, tokens_BS)
    (again_loss, again, fewer_bytes), again_sums = _experts_step(recompute, tokens_BS)
    assert torch.equal(again_loss, loss)
    assert torch.equal(again_sums, sums)
    for parameter, gradient in gradients.items():
        assert torch.equal(again[parameter], gradient), parameter
    assert fewer_bytes < kept_bytes


def test_moe_keeps_less_than_its_activation_alone(tokens_BS: Tensor) -> None:
    kept = {
        name: _experts_step(selective(name), tokens_BS)[0][2] for name in ("moe_act", "shared_experts", "moe", "mlp")
    }
    assert kept["moe"] < kept["moe_act"]
    assert kept["moe"] < kept["shared_experts"]
    # One layer is dense, and mlp is about that one.
    assert kept["moe"] < kept["mlp"]
