"""Flags of Megatron-LM and MindSpeed-LLM that have no field here, and why.

Three tables. `ACCEPTED`: what the flag asks for is always so here, or has nothing to act on; it
is taken, and the reason is printed once. `INSTEAD`: another flag does it. `LATER`: tessel
does not do it; refused, since a flag that is accepted and ignored changes results in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tessel.config.suites import SUITES_ACCEPTED, SUITES_INSTEAD, SUITES_LATER

MANY = 1_000
"""As a number of values: all up to the next flag."""


@dataclass(frozen=True)
class Accepted:
    """A flag without effect: how many values follow it, why it does nothing, and which values are fine."""

    num_values: int
    reason: str
    only: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ForeignFlags:
    """Flags of other suites, as the parser wants them."""

    accepted: Mapping[str, Accepted] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)
    later: Mapping[str, str] = field(default_factory=dict)
    later_families: Sequence[tuple[str, str]] = ()

    def names(self) -> Iterable[str]:
        """Every flag that is known by its whole name."""
        return (*self.accepted, *self.instead, *self.later)

    def refusal(self, flag: str, values: Sequence[str] = ()) -> str | None:
        """Why a flag of these tables is refused, as a sentence about it; None if it is not."""
        if flag in self.accepted:
            only = self.accepted[flag].only
            if only is None or all(value in only for value in values):
                return None
            return (
                f"{flag} {' '.join(values)} is not supported yet: only {' or '.join(only)}, which is what tessel does."
            )
        if flag in self.instead:
            return f"{flag} is not a flag of tessel: {self.instead[flag]}."
        return self._not_yet(flag, self.later.get(flag))

    def family_refusal(self, flag: str) -> str | None:
        """As `refusal`, of a flag that is known by its beginning alone."""
        return self._not_yet(flag, next((what for start, what in self.later_families if flag.startswith(start)), None))

    def _not_yet(self, flag: str, what: str | None) -> str | None:
        return None if what is None else f"{flag} is not supported yet: {what}; leave it out."

    def notes(self, flags: Iterable[str]) -> list[str]:
        """One line that says why each of `flags`, all accepted ones, has no effect; none for no flags."""
        by_reason: dict[str, list[str]] = {}
        for flag in dict.fromkeys(flags):
            by_reason.setdefault(self.accepted[flag].reason, []).append(flag)
        if not by_reason:
            return []
        told = "; ".join(f"{' '.join(names)} ({reason})" for reason, names in by_reason.items())
        return [f"accepted without effect: {told}"]


def _accepted(reason: str, flags: str) -> dict[str, Accepted]:
    """Rows of one reason: flags apart by spaces, `=N` or `=*` after one that takes values."""
    rows = {}
    for entry in flags.split():
        flag, _, count = entry.partition("=")
        rows[flag] = Accepted(MANY if count == "*" else int(count or 0), reason)
    return rows


def _later(what: str, flags: str) -> dict[str, str]:
    """Rows of one matter that tessel lacks."""
    return dict.fromkeys(flags.split(), what)


# Of --ai-framework, where nothing is trained.
SAME_FILES = "PyTorch does it, and files are the same for every framework"

ACCEPTED: dict[str, Accepted] = {
    **_accepted("there is one model implementation", (
        "--use-mcore-models --use-legacy-models --transformer-impl=1 --spec=*"
    )),
    **_accepted("the best kernels that the device has are always taken, and the log names them", (
        "--use-flash-attn --use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb --use-fused-mlp "
        "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion "
        "--no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --cross-entropy-loss-fusion "
        "--cross-entropy-fusion-impl=1 --memory-efficient-layer-norm --disable-jit-fuser"
    )),
    **_accepted("always so", (
        "--attention-softmax-in-fp32 --apply-query-key-layer-scaling "
        "--exit-signal-handler --use-checkpoint-args --use-cpu-initialization --no-initialization --use-dist-ckpt "
        "--dist-ckpt-format=1 --auto-detect-ckpt-format --no-one-logger "
        "--no-position-embedding --no-use-tokenizer-model-from-checkpoint-args "
        "--disable-symmetric-registration --keep-sequential-samples --use-kv-cache"
    )),
    **_accepted("PyTorch's own parallel engine has no such setting", (
        "--distributed-backend=1 --disable-gloo-group --disable-gloo-process-groups "
        "--overlap-param-gather-with-optimizer-step --no-align-grad-reduce --no-align-param-gather "
        "--no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush --ddp-num-buckets=1 "
        "--ddp-bucket-size=1 --ddp-average-in-collective --ddp-pad-buckets-for-high-nccl-busbw "
        "--no-async-tensor-model-parallel-allreduce --no-scatter-gather-tensors-in-pipeline --use-ring-exchange-p2p "
        "--local-rank=1 --lazy-mpu-init=1 --use-custom-fsdp --use-megatron-fsdp --use-torch-fsdp2 "
        "--outer-dp-sharding-strategy=1 --no-gradient-reduce-div-fusion "
        "--suggested-communication-unit-size=1 "
        "--use-cp-send-recv-overlap --nccl-communicator-config-path=1 "
        "--use-tp-pp-dp-mapping --tp-comm-overlap-cfg=1 --disable-tp-comm-overlap-ag "
        "--disable-tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad --disable-tp-comm-bulk-dgrad "
        "--disable-tp-comm-bulk-wgrad --tp-comm-bootstrap-backend=1 --disable-tp-comm-split-ag "
        "--disable-tp-comm-split-rs --pipeline-model-parallel-comm-backend=1 --data-parallel-random-init "
        "--no-clone-scatter-output-in-embedding --check-weight-hash-across-dp-replicas-interval=1 "
        "--distribute-saved-activations --defer-embedding-wgrad-compute --wgrad-deferral-limit=1 --use-sharp "
        "--use-nccl-ub --create-all-gather-group --high-priority-stream-groups=* "
        "--enable-recompute-layers-per-pp-rank "
        "--kv-head-repeat-before-uly-alltoall --use-fused-ring-attention-update --cp-window-size=1 "
        "--async-log-allreduce "
        "--use-gloo-process-groups --torch-fsdp2-no-reshard-after-forward --init-model-with-meta-device"
    )),
    **_accepted("--use-ascend-coc takes the device's own overlap, which has no such setting", (
        "--coc-parallel-num=1 --coc-fused-kernel"
    )),
    **_accepted("experts are always computed in one grouped product where the device has one", (
        "--moe-grouped-gemm --moe-use-legacy-grouped-gemm --gemm-gradient-accumulation-fusion "
        "--moe-permute-fusion --use-fused-moe-token-permute-and-unpermute --moe-router-fusion "
        "--enable-token-rearrange-opt"
    )),
    **_accepted("tokens always travel to their experts by all-to-all", (
        "--moe-permutation-async-comm --moe-alltoall-overlap-comm --moe-fb-overlap --moe-shared-expert-overlap "
        "--moe-enable-deepep"
    )),
    **_accepted("data is memory-mapped and indexed in one pass", (
        "--no-mmap-bin-files --dataloader-fast-cache-load "
        "--dataloader-defer-npy-index-mmap --dataset-impl=1 --per-dataset-sequences-path=1 --enable-share-memory "
        "--streaming --cache-dir=1 --overwrite-cache"
    )),
    **_accepted("timers cost nothing to speak of and are always on", (
        "--timing-log-level=1 --timing-log-option=1 --no-barrier-with-level-1-timing --train-sync-interval=1"
    )),
    **_accepted("no such service or setting here", (
        "--one-logger-project=1 --one-logger-run-name=1 --one-logger-async --app-tag-run-name=1 "
        "--app-tag-run-version=1 --logging-level=1 --disable-msc --enable-msc --empty-unused-memory-level=1 "
        "--no-manual-gc-eval --rerun-mode=1 --te-rng-tracker --inference-rng-tracker"
    )),
    **_accepted("tessel's checkpoints have one format and check every tensor", (
        "--ckpt-fully-parallel-save --no-ckpt-fully-parallel-save --ckpt-fully-parallel-load "
        "--ckpt-assume-constant-structure --dist-ckpt-strictness=1 --use-persistent-ckpt-worker "
        "--use-mp-args-from-checkpoint-args --ckpt-drop-redundant-extra-state --verify-integrity "
        "--dist-ckpt-optim-fully-reshardable"
    )),
    **_accepted("--load takes any format, and hf/ is always written at the end", (
        "--enable-hf2mg-convert --enable-mg2hf-convert"
    )),
    **_accepted("weights are held once, in fp32", "--reuse-fp32-param"),
    **_accepted("checkpoints hold adapters alone; tessel merge writes the whole model", "--qlora-save-dequantize"),
    **_accepted("the optimizer is torch's on every device", "--use-torch-optimizer-for-cpu-offload"),
    **_accepted("one parameter's state after the other", "--swap-optimizer-times=1"),
    **{flag: row for reason, flags in SUITES_ACCEPTED.items() for flag, row in _accepted(reason, flags).items()},
    **_accepted("--profile is torch's own profiler, and records every operator and kernel", "--use-pytorch-profiler"),
    "--sparse-mode": Accepted(1, "always causal", only=("0", "2")),
    "--cp-attention-mask-type": Accepted(1, "masks follow from the documents"),
    "--main-grads-dtype": Accepted(1, "always so", only=("fp32",)),
    "--main-params-dtype": Accepted(1, "always so", only=("fp32",)),
    "--attention-mask-type": Accepted(1, "always so", only=("causal",)),
    "--moe-zero-memory": Accepted(1, "use --recompute-granularity", only=("disable",)),
    "--rope-type": Accepted(1, "always so; config.json says what is YaRN", only=("rope",)),
    "--encoder-tensor-model-parallel-size": Accepted(1, "there is no encoder", only=("0", "1")),
    "--encoder-pipeline-model-parallel-size": Accepted(1, "there is no encoder", only=("0",)),
    "--partitions": Accepted(1, "files are read in one go", only=("1",)),
}  # fmt: skip

INSTEAD: dict[str, str] = {
    **SUITES_INSTEAD,
    "--batch-size": "use --micro-batch-size",
    "--warmup": "use --lr-warmup-fraction",
    "--model-parallel-size": "use --tensor-model-parallel-size",
    "--checkpoint-activations": "use --recompute-activations",
    "--recompute-norm": "use --recompute-granularity selective --recompute-modules layernorm",
    "--recompute-norm-num-layers": "use --recompute-granularity selective --recompute-modules layernorm",
    "--quant-states": "use --use-precision-aware-optimizer --exp-avg-dtype 8bit --exp-avg-sq-dtype 8bit",
    "--encoder-num-layers": "use --num-layers",
    "--encoder-seq-length": "use --seq-length",
    "--max-length": "use --seq-length, or --max-new-tokens in generate",
    "--rotary-seq-len-interpolation-factor": "use --rope-scaling-type linear --rope-scaling-factor N",
    "--pretrained-checkpoint": "use --load DIR --finetune",
    "--mock-data": "give --data-path any text file instead",
    "--moe-tp-extend-ep": "use --expert-tensor-parallel-size 1 and a larger --expert-model-parallel-size",
    "--moe-extended-tp": "use --expert-tensor-parallel-size",
    "--npu-deterministic": "use --deterministic-mode",
    "--jit-compile": "use --compile",
    "--most-recent-k": "use --keep-last-k",
    "--model-type": "the kind of model is read from config.json",
    "--model-type-hf": "the family is read from config.json",
    "--params-dtype": "use --bf16, --fp16 or --fp32",
    "--yaml-cfg": "use --config",
    "--trust-remote-code": "code from a model's folder is never run",
    **dict.fromkeys(
        ("--num-beams", "--hf-chat-template", "--add-eos-token", "--stream", "--prompt-file"),
        "it is one of tessel generate",
    ),
    "--no-load-strict": "missing or surplus tensors are always errors",
}

LATER: dict[str, str] = {
    **SUITES_LATER,
    **_later("this way of dealing out layers (--num-layer-list is there)", (
        "--pipeline-model-parallel-split-rank "
        "--microbatch-group-size-per-virtual-pipeline-stage --pipeline-model-parallel-layout "
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --schedules-method"
    )),
    **_later("this part of a mixture of experts", (
        "--moe-router-num-groups --moe-router-group-topk --moe-input-jitter-eps --moe-use-upcycling "
        "--moe-latent-size --moe-per-layer-logging --moe-router-force-load-balancing"
    )),
    **_later("this way to save memory (--recompute-modules, --cpu-offloading and --swap-attention are there)", (
        "--fine-grained-activation-offloading --offload-modules --min-offloaded-tensor-size --swap-modules "
        "--smart-swap --adaptive-recompute-device-size --adaptive-recompute-device-swap --recompute-in-bubble "
        "--recompute-in-advance --cpu-offloading-weights --optimizer-cuda-graph"
    )),
    **_later("precisions beyond --bf16, --fp16 and --fp32", (
        "--quant-grads --fp16-lm-cross-entropy "
        "--fp32-residual-connection --disable-bf16-reduced-precision-matmul --first-last-layers-bf16 "
        "--num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16"
    )),
    **_later("tessel has nothing like it", (
        "--init-method-xavier-uniform --iterations-to-skip --decrease-batch-size-if-needed "
        "--check-for-spiky-loss --check-for-large-grads --step-batch-size-schedule "
        "--result-rejected-tracker-filename --log-progress --log-straggler --log-energy "
        "--disable-straggler-on-startup --straggler-ctrlr-port --straggler-minmax-count "
        "--error-injection-rate --error-injection-type --config-logger-dir --run-workload-inspector-server "
        "--workload-inspector-server-port --adlr-autoresume --adlr-autoresume-interval --s3-cache-path "
        "--object-storage-cache-path --eval-global-batch-size --eval-micro-batch-size --start-eval-at-iter "
        "--record-memory-history --freeze-all-layers --no-weight-decay-cond-type "
        "--gpu-sniff-test-interval --throughput-window-size --override-ckpt-iteration "
        "--load-main-params-from-ckpt --memory-snapshot-path"
    )),
    "--phase-transition-iterations": (
        "phases of data in one run; end it there with --exit-interval, and go on from it with the next data by "
        "--load DIR --override"
    ),
    **_later("other formats of checkpoints", (
        "--ckpt-convert-format --ckpt-convert-save --ckpt-convert-update-legacy-dist-opt-format --replication "
        "--replication-jump --replication-factor"
    )),
    **_later("fine-tuning on dialogues as Megatron-LM reads them (--is-instruction-dataset is there)", (
        "--sft --sft-tokenizer-prompt-format"
    )),
    "--mix-strategy": "a registry of data sets (mix by weights in --data-path)",
    **_later("a server of Megatron's", "--inference-batch-times-seqlen-threshold --max-tokens-to-oom"),
    **_later("models other than Qwen, Llama, Mistral and Mixtral as config.json describes them", (
        "--multi-latent-attention --mtp-num-layers --mtp-loss-scaling-factor "
        "--apply-layernorm-1p --openai-gelu --squared-relu --quick-geglu --rotary-interleaved --mrope-section "
        "--onnx-safe --apply-residual-connection-post-layernorm --relative-attention-num-buckets "
        "--relative-attention-max-distance --bert-no-binary-head --decoder-num-layers --decoder-seq-length "
        "--vocab-extra-ids --window-attn-skip-freq --no-rope-freq --is-hybrid-model "
        "--kv-lora-rank --q-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim "
        "--rotary-scaling-factor --cache-mla-latents --linear-attention-freq "
        "--apply-wd-to-qk-layernorm --add-position-embedding --max-tokens-per-batch"
    )),
}  # fmt: skip

LATER_FAMILIES: tuple[tuple[str, str], ...] = (
    ("--moe-", "this part of a mixture of experts"),
    ("--lora-", "this part of LoRA"),
    ("--lu-lora-", "LU-LoRA (--lora-r, --use-rslora and --use-dora are there)"),
    ("--fp8-", "fp8 training (use --bf16)"),
    ("--fp4-", "fp4 training (use --bf16)"),
    (
        "--profile",
        "this part of profiling (--profile-with-cpu, -stack and -memory and --profile-record-shapes are there)",
    ),
    ("--use-nsys-profiler", "profiling by another program (--profile is there)"),
    ("--pytorch-profiler-", "this part of profiling (--profile-with-stack and --profile-record-shapes are there)"),
    (
        "--dpo-",
        "this part of preference optimisation (--dpo-loss-type, --dpo-beta and --dpo-label-smoothing are there)",
    ),
    ("--rl-", "reinforcement learning"),
    ("--grpo-", "reinforcement learning"),
    ("--lion-", "the Lion optimizer (--optimizer adam or sgd)"),
    ("--muon-", "the Muon optimizer (--optimizer adam or sgd)"),
    ("--retro-", "models other than decoders"),
    ("--retriever-", "models other than decoders"),
    ("--biencoder-", "models other than decoders"),
    ("--bert-", "models other than decoders"),
    ("--ict-", "models other than decoders"),
    ("--vision-", "models other than decoders"),
    ("--dino-", "models other than decoders"),
    ("--ckpt-", "a setting of Megatron's own checkpoint formats"),
    ("--dist-ckpt-", "a setting of Megatron's own checkpoint formats"),
    ("--async-", "a setting of Megatron's own checkpoint formats"),
    ("--ddp-", "a setting of Megatron's data parallelism"),
    ("--fsdp-", "a setting of Megatron's data parallelism"),
    ("--megatron-fsdp-", "a setting of Megatron's data parallelism"),
    ("--gtp-", "a setting of Megatron's data parallelism"),
    ("--flight-recorder-", "a record of collectives"),
    ("--distributed-timeout-", "this limit of time (--distributed-timeout-minutes is there)"),
    ("--tokenizer-", "this setting of a tokenizer"),
    ("--exit-signal-", "signals other than SIGTERM and SIGINT"),
    ("--save-", "this kind of dump"),
    ("--log-", "this part of the log"),
    ("--enable-", "this part of MindSpeed or Megatron"),
    ("--mla-", "latent attention"),
    ("--yarn-", "YaRN by flags (a config.json with YaRN works)"),
    ("--rope-scaling-", "YaRN by flags (a config.json with YaRN works)"),
    ("--fim-", "fill-in-the-middle data"),
    ("--mamba-", "state-space models"),
    ("--hybrid-", "state-space models"),
    ("--inprocess-", "restarts inside a process (--max-restarts starts all processes again)"),
    ("--calc-ft-timeouts", "restarts by a fault-tolerance service (--max-restarts is there)"),
    ("--ft-", "restarts by a fault-tolerance service (--max-restarts is there)"),
    ("--non-persistent-", "temporary checkpoints (--save-interval with --keep-last-k is there)"),
    ("--cuda-graph", "CUDA graphs"),
    ("--external-cuda-graph", "CUDA graphs"),
    ("--inference-", "Megatron's inference server (tessel serve is there)"),
    ("--heterogeneous-layers-config-", "layers of unequal shape"),
    ("--kitchen-", "quantisation recipes"),
    ("--logits-", "distillation"),
    ("--otel-", "OpenTelemetry"),
    ("--wandb-", "this Weights & Biases setting"),
)

MEGATRON = ForeignFlags(ACCEPTED, INSTEAD, LATER, LATER_FAMILIES)
"""For the verbs that take a model's or a run's flags."""
