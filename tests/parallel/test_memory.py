"""What saves memory changes no bit where parameters are sharded, either."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.processes import run


def _trained(in_bf16: bool, memory: Any, kernels: Any) -> tuple[list[Any], list[Any]]:
    """Three steps on two replicas that share out everything: losses of this rank, and its shards after them."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from tessel.config.run import Optimizer
    from tessel.model.balance import Balance, RouterOptions
    from tessel.model.config import ModelConfig
    from tessel.model.init import initialize_
    from tessel.model.offload import Offload
    from tessel.model.recompute import Recompute
    from tessel.model.transformer import Transformer
    from tessel.parallel.apply import Sharding, shard
    from tessel.train.optimizer import build_optimizer, parameter_groups, state_by_name

    config = ModelConfig.from_hf(
        {
            "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96,
            "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0],
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 64,
        }
    )  # fmt: skip
    balance = Balance(config, RouterOptions("aux_loss", aux_loss_coeff=0.01))
    model = Transformer(
        config,
        hidden_dropout=0.1,
        recompute=Recompute.from_options(kernels, memory, has_experts=True),
        offload=Offload.from_options(memory),
        balance=balance,
    )
    initialize_(model, config, std=0.1, seed=1)
    mesh = init_device_mesh("cpu", (2,))
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    # Either way of gathering once.
    shard(model, Sharding(mesh, mesh, dtype, reshard_after_forward=in_bf16))
    options = Optimizer(lr=1e-2)
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), config, options), options, memory)
    torch.manual_seed(mesh.get_local_rank())
    losses = []
    for _ in range(3):
        balance.start_step(0.5)
        tokens_BS = torch.randint(0, 64, (4, 17))
        loss = model(tokens_BS[:, :-1], labels_BS=tokens_BS[:, 1:], weights_BS=torch.full((4, 16), 1 / 128))
        loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.tolist())
    tensors = [*model.parameters(), *state_by_name(optimizer).values()]
    return losses, [tensor.to_local().tolist() for tensor in tensors if hasattr(tensor, "to_local")]  # type: ignore[attr-defined]


def _compared(in_bf16: bool) -> None:
    from tessel.config.memory import Memory
    from tessel.config.run import Kernels

    selective = Kernels(recompute_granularity="selective")
    full = Kernels(recompute_granularity="full", recompute_method="block", recompute_num_layers=1)
    modules = ("core_attn", "layernorm", "mlp", "moe_act")
    variants = [
        (Memory(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5), Kernels()),
        (Memory(swap_optimizer=True, cpu_offloading_num_layers=3), Kernels()),
        (Memory(swap_attention=True, recompute_modules=modules), selective),
        (Memory(cpu_offloading_num_layers=2, recompute_activation_function=True), full),
        (Memory(recompute_modules=("moe",)), selective),
    ]
    expected = _trained(in_bf16, Memory(), Kernels())
    for memory, kernels in variants:
        assert _trained(in_bf16, memory, kernels) == expected, (memory, kernels)


@pytest.mark.parametrize("in_bf16", [False, True])
def test_two_replicas_that_share_out_everything(in_bf16: bool) -> None:
    run(2, _compared, in_bf16)


def _few_experts() -> list[int]:
    """Gradients of three experts on two processes are those of a whole model; elements of each that are here."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from tessel.model.config import ModelConfig
    from tessel.model.init import initialize_
    from tessel.model.transformer import Transformer
    from tessel.parallel.apply import Sharding, shard

    config = ModelConfig.from_hf(
        {
            "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 64,
        }
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (2,))
    whole, shared = Transformer(config), Transformer(config)
    for model in (whole, shared):
        initialize_(model, config, std=0.1, seed=1)
    shard(shared, Sharding(mesh, mesh, torch.float32))
    tokens_BS = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(1))
    for model in (whole, shared):
        # Both processes compute the same, and what they have is summed.
        weights_BS = torch.full((4, 16), 1 / 64 if model is whole else 1 / 128)
        model(tokens_BS[:, :-1], labels_BS=tokens_BS[:, 1:], weights_BS=weights_BS).backward()
    held = []
    for (name, expected), parameter in zip(whole.named_parameters(), shared.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, msg=name)  # type: ignore[attr-defined]
        if ".experts." in name:
            held.append(parameter.to_local().numel())  # type: ignore[attr-defined]
    return held


def test_fewer_experts_than_processes_are_shared_out_evenly() -> None:
    assert run(2, _few_experts) == [[3 * 48 * 32 // 2] * 3] * 2
