"""megatron-core on CPU processes: its GPTModel, and its own dist_checkpointing on both sides of ours."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import queue
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessel.checkpoint.fill import fill_model
from tessel.checkpoint.stored import StoredModel
from tessel.model.config import ModelConfig
from tessel.model.transformer import Transformer

# As Megatron-LM calls sharded_state_dict, and notes in common.pt.
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


class _NoStates:
    """Megatron forks the random state of an accelerator around dropout, which is off here."""

    def fork(self, *_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True


def gpt_model(config: ModelConfig, rows: int, tp: int = 1, pp: int = 1, ep: int = 1) -> torch.nn.Module:
    """This rank's part of a GPTModel of the same shape, with `rows` rows of vocabulary."""
    warnings.simplefilter("ignore")
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]  # asked for by its constructors
    torch.Tensor.cuda = lambda tensor: tensor  # type: ignore[assignment]  # a tied embedding's copy is moved
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.tensor_parallel import random as streams
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1)
    streams.initialize_rng_tracker()
    streams._CUDA_RNG_STATE_TRACKER = _NoStates()
    experts: dict[str, Any] = {}
    if config.num_experts:
        freq: Any = [int(config.has_experts(layer)) for layer in range(config.num_hidden_layers)]
        experts = {
            "num_moe_experts": config.num_experts,
            "moe_ffn_hidden_size": config.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size or None,
            "moe_router_topk": config.num_experts_per_tok,
            "moe_layer_freq": freq if config.dense_layers else 1,
            "expert_model_parallel_size": ep,
            "expert_tensor_parallel_size": 1,
            "add_bias_linear": False,
        }
        if config.shared_expert_intermediate_size:
            experts["moe_shared_expert_gate"] = True
    shape = TransformerConfig(
        **{
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_query_groups": config.num_key_value_heads,
            "kv_channels": config.head_dim,
            "ffn_hidden_size": config.intermediate_size,
            "layernorm_epsilon": config.rms_norm_eps,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": config.attention_bias,
            "qk_layernorm": config.qk_norm,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "use_cpu_initialization": True,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "bias_dropout_fusion": False,
            "gradient_accumulation_fusion": False,
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "pipeline_dtype": torch.float32,
            **experts,
        }
    )
    return GPTModel(
        shape,
        get_gpt_decoder_block_spec(shape, use_transformer_engine=False, normalization="RMSNorm"),
        vocab_size=rows,
        max_sequence_length=config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=int(config.rope_theta),
        share_embeddings_and_output_weights=config.tie_word_embeddings,
    )


def load(model: torch.nn.Module, folder: Path) -> None:
    """megatron-core reads the checkpoint of an iteration into its model, and complains of what is not there."""
    from megatron.core import dist_checkpointing

    wanted = {"model": model.sharded_state_dict(metadata=dict(CONTENT))}  # type: ignore[operator]
    loaded = dist_checkpointing.load(wanted, str(folder))
    assert loaded["iteration"] == 1
    model.load_state_dict(loaded["model"])


def save(model: torch.nn.Module, folder: Path, args: dict[str, Any]) -> None:
    """megatron-core writes its model as the checkpoint of an iteration."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Its own lies in a manager's process, which would outlive this one.
    results: queue.Queue[Any] = queue.Queue()
    filesystem_async._get_write_results_queue = lambda: results
    filesystem_async._process_memory = lambda: 0  # for its log, by a package that is not needed otherwise
    # It writes by processes of its own, which a daemon may not have; it waits for them.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]  # asked for before it writes
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "model": model.sharded_state_dict(metadata=dict(CONTENT)),  # type: ignore[operator]
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 1,
    }
    torch.distributed.barrier()
    dist_checkpointing.save(content, str(folder))


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Values that are everywhere others, norms and biases included."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))


def losses(theirs: torch.nn.Module, config: ModelConfig, stored: StoredModel) -> tuple[Tensor, Tensor]:
    """The loss of each token: tessel's with the stored weights, and megatron-core's."""
    ours = Transformer(config)
    fill_model(ours, stored.tensors)
    length = 24
    tokens_BS = torch.randint(0, config.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(2))
    inputs_BS, labels_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]
    hidden_from_future = torch.ones(1, 1, length, length).tril() < 0.5
    with torch.no_grad():
        expected_BS = theirs(inputs_BS, torch.arange(length).expand(2, -1), hidden_from_future, labels=labels_BS)
        return ours(inputs_BS, labels_BS=labels_BS), expected_BS
