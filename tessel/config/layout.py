"""How a run is spread over processes: sections of frozen dataclasses, as in `run.py`."""

from __future__ import annotations

from dataclasses import dataclass

from tessel.config.field import option

SHARDING_STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


@dataclass(frozen=True)
class Launch:
    """Processes. Under torchrun these come from its environment; --nproc-per-node starts them here."""

    nproc_per_node: int | None = option(None, "start so many processes on this machine, by torchrun's agent")
    nnodes: str = option("1", "machines; a range for an elastic run (with --nproc-per-node)", metavar="N|MIN:MAX")
    node_rank: int = option(0, "number of this machine, from 0 (with --nproc-per-node)")
    master_addr: str = option("127.0.0.1", "address of machine 0 (with --nproc-per-node)", metavar="HOST")
    master_port: int | None = option(None, "port on machine 0; a free one if not given (with --nproc-per-node)")
    max_restarts: int = option(0, "restarts after a failure (with --nproc-per-node)")
    distributed_timeout_minutes: float = option(10, "how long one operation between processes may take")
    rank_log_dir: str | None = option(None, "folder for a log file of each rank", metavar="DIR")
    no_shared_storage: bool = option(
        False, "machines share no folders: each builds its own index caches and keeps its own checkpoints"
    )


@dataclass(frozen=True)
class Layout:
    """Layout of model, sequences and samples over the processes."""

    tensor_model_parallel_size: int = option(1, "processes that share each layer")
    sequence_parallel: bool = option(False, "tensor-parallel processes share the tokens between layers, too")
    tp_comm_overlap: bool = option(
        False,
        "overlap tensor-parallel communication with computation by what the device has for it: MC2 on NPUs, else "
        "torch's async tensor parallelism",
        aliases=("--use-ascend-mc2", "--use-mc2", "--use-ascend-coc"),
    )
    pipeline_model_parallel_size: int = option(1, "processes that share the layers")
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers in a virtual pipeline stage: each process holds several, interleaved"
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(None, "virtual pipeline stages of each process")
    num_layer_list: str | None = option(None, "layers of each pipeline stage, such as 6,8,8,6", metavar="N,N,...")
    decoder_first_pipeline_num_layers: int | None = option(None, "layers of the first pipeline stage")
    decoder_last_pipeline_num_layers: int | None = option(None, "layers of the last pipeline stage")
    noop_layers: str | None = option(None, "places in the pipeline that hold no layer, such as 94,95", metavar="N,N")
    pipeline_schedule: str | None = option(
        None,
        "order of work in the pipeline; 1f1b, or interleaved with virtual stages, if not given",
        choices=("1f1b", "interleaved", "interleaved-zero-bubble", "zbv"),
    )
    context_parallel_size: int = option(1, "processes that share each sequence")
    cp_comm_type: str | None = option(
        None,
        "how they share it: p2p is a ring (the default), a2a Ulysses",
        choices=("p2p", "a2a", "allgather", "a2a+p2p"),
    )
    context_parallel_algo: str | None = option(
        None,
        "MindSpeed's names for --cp-comm-type",
        choices=("megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo"),
    )
    ulysses_degree_in_cp: int | None = option(None, "processes of the inner all-to-all with a2a+p2p")
    expert_model_parallel_size: int = option(1, "processes that share the experts")
    expert_tensor_parallel_size: int | None = option(
        None, "processes that share each expert; the tensor-parallel size if not given"
    )
    data_parallel_sharding_strategy: str | None = option(
        None,
        "what data-parallel processes share instead of repeating; no_shard if not given",
        choices=SHARDING_STRATEGIES,
    )
    use_distributed_optimizer: bool = option(False, "at least --data-parallel-sharding-strategy optim")
    num_distributed_optimizer_instances: int = option(1, "groups that each hold the sharded state once")
    overlap_grad_reduce: bool = option(
        False, "accepted: gradients are reduced while backward goes on in any case, in a pipeline after it"
    )
    overlap_param_gather: bool = option(False, "gather the next layer's weights while one computes")
    grad_reduce_in_bf16: bool = option(False, "sum gradients over processes in bf16 instead of fp32")
