"""Flags of MindSpeed-LLM, ModelLink and Pai-Megatron-Patch beyond Megatron's, in the words of `config.megatron`.

They are apart from Megatron's rows only to keep both files short; `config.megatron` joins them.
"""

from __future__ import annotations

_LATER_BY_MATTER: dict[str, str] = {
    "models other than Qwen, Llama, Mistral and Mixtral as config.json describes them": (
        "--add-output-layer-bias --add-dense-bias --add-rmsnorm-offset --attn-logit-softcapping --cla-share-factor "
        "--dim-model-base --embed-layernorm --embedding-multiplier-scale --fill-neg-inf --full-attention-interval "
        "--geglu --gelu-tanh --glu-activation --index-head-dim --index-n-heads --index-topk --input-embeds-norm "
        "--input-layernorm-in-fp32 --interleave-sliding-window --linear-key-head-dim --linear-num-key-heads "
        "--linear-num-value-heads --linear-value-head-dim --long-factor --long-mscale --longrope-freqs-type "
        "--moba-calc-method --moba-chunk-size --moba-topk --mtp-after-norm --mtp-mem-efficient-logits "
        "--multi-head-latent-attention --no-enable-linear-qkv --no-post-layer-norm --output-layer-slice-num "
        "--output-logit-softcapping --output-multiplier-scale --padded-base-length --partial-rotary-factor "
        "--post-norm --qk-nope-head-dim --qk-rope-head-dim --query-pre-attn-scalar --recompute-mla-up-proj "
        "--scale-depth --scale-emb --scale-fmt --share-kvstates --short-factor --short-mscale --skip-bias-add "
        "--square-alibi-mask --alibi-fusion-attn-type --use-alibi-mask --use-glm-rope --use-moba-attn "
        "--use-partial-rope --use-triton-gdn --w-pack --beta-fast --beta-slow --mscale --mscale-all-dim "
        "--no-yarn-correction-range-round-to-int --rotary-scale-factor --attention-head-type --transformer-type "
        "--position-encoding-2d --use-normhead --disable-bias-attn-fc --disable-bias-linear-fc --pre-tockens "
        "--next-tockens --indexer-batch-size --indexer-log-interval --num-speculative-tokens --output-logit-dtype"
    ),
    "this part of a mixture of experts": (
        "--dynamic-factor --expert-interval --fix-router --input-jitter --n-group --noisy-gate-policy --topk-group "
        "--shared-expert-gate-output-dimension --use-tutel --router-type --moe"
    ),
    "reinforcement learning": (
        "--advantage-whiten --clip-ratio --cliprange-value --critic-mini-batch-size --critic-update-epochs "
        "--dataset-category --do-sample --entropy-coeff --fc-type --extract-content-for-reward --gamma --kl-coef --lam "
        "--max-prompt-length --missing-eos-penalty --n-samples-per-prompt --num-gpus-for-infer "
        "--num-gpus-for-train --num-samples-per-step --ppo-epochs --ppo-mini-batch-size --reward-model "
        "--rollout-batch-size --shuffle-minibatch --langrl-env-config --perform-rl-step --refit-method"
    ),
    "context parallelism of this kind (--cp-comm-type p2p, a2a, allgather and a2a+p2p are there)": (
        "--adaptive-cp-dynamic-attn-mask --adaptive-cp-manually-set-mask-list --adaptive-cp-only-reschedule "
        "--adaptive-cp-without-coarse"
    ),
    "two-dimensional tensor parallelism (--tensor-model-parallel-size with --sequence-parallel is there)": (
        "--tp-2d --tp-x --tp-y --use-nd-matmul --nd1-dim1-size --nd2-dim1-size --enable-overlap-ag-with-matmul "
        "--enable-backward-overlap-ag-with-matmul --enable-overlap-matmul-with-rs"
    ),
    "this way of dealing out layers (--num-layer-list is there)": (
        "--dualpipev-dw-detach --seq1f1b-balance-method --seq1f1b-splits --enable-seq1f1b"
    ),
    (
        "MindIO's service (a run saves before it stops on SIGTERM, --max-restarts starts its processes again, and "
        "--nnodes MIN:MAX goes on with fewer machines)"
    ): (
        "--enable-high-availability --enable-hbmfault-repair --enable-worker-reboot --enable-elastic-training "
        "--distributed-optimizer-no-replica --enable-ft-package"
    ),
    "images and video": (
        "--allow-missing-vision-projection-checkpoint --cvcuda-image-processing --dataset-config "
        "--disable-vision-class-token --freeze-clip-vision-tower --freeze-llm --freeze-vit --freeze-lm --ftfy "
        "--image-aspect-ratio --image-folder --image-size --image-tag-type --language-model-type --max-num-tiles "
        "--mm-projector-type --mm-use-im-patch-token --mm-use-im-start-end --mm-vision-select-layer --num-frames "
        "--online-evaluation-config --prompt-path --spatial-merge-size --tune-mm-mlp-adapter --use-thumbnail "
        "--use-tiling --dataloader-seq-length --disable-parallel-output"
    ),
    "Pai's evaluation inside training (tessel evaluate is there)": (
        "--eval-dev --eval-fp32 --generation-length --input-len --out-seq-length --source-seq-len --target-seq-len "
        "--task-list --text-generate-gt-file --text-generate-input-file --text-generate-output-file --time "
        "--keep-last --verbosity --version"
    ),
    "this way to ask questions (--num-fewshot, --prompt-type and --rule are there)": (
        "--alternative-prompt --chain-of-thought --instruction-template --origin-postprocess"
    ),
    "a part of Megatron's tests": (
        "--fake-process-group --gemm-shapes --skip-allreduce --skip-alltoall --skip-gemm --skip-reducescatter "
        "--skip-sendrecv --test-mode --dump-param-to-param-group-map"
    ),
    "precisions beyond --bf16, --fp16 and --fp32": (
        "--keep-fp8-transpose-cache --keep-fp8-transpose-cache-when-using-custom-fsdp --no-fp8-wgrad "
        "--reuse-grad-buf-for-mxfp8-param-ag --te-precision-config-file"
    ),
    "CUDA graphs": "--decode-only-cuda-graphs --enable-cuda-graph",
    "a place for the data loader's state": "--dataloader-save",
    "the ids of documents beside samples": "--return-document-ids",
    "lengths that change from batch to batch (--no-pad-to-seq-lengths is there)": "--adaptive-seq-len",
    "a learning rate of the head alone (--decoupled-lr is there)": "--head-lr-mult",
    "Megatron's own generation inside training (tessel generate is there)": (
        "--flash-decode --enable-chunked-prefill --use-legacy-static-engine --use-same-sampling-seed-across-dp-ranks"
    ),
}

SUITES_LATER: dict[str, str] = {flag: what for what, flags in _LATER_BY_MATTER.items() for flag in flags.split()}
"""Refused: flag -> what tessel lacks."""

SUITES_INSTEAD: dict[str, str] = {
    "--o2-optimizer": "use --use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
    "--o2-gradient": "use --grad-reduce-in-bf16; gradients are accumulated in fp32",
    "--hierarchical-context-parallel-sizes": "use --ulysses-degree-in-cp with --cp-comm-type a2a+p2p",
    "--history-turns": "it is one of tessel chat",
    "--window-size": "config.json says it",
    **dict.fromkeys(
        ("--n-subs", "--merge-group-keys", "--split-sentences", "--keep-newlines", "--lang"),
        "it is one of tessel preprocess",
    ),
    "--enable-shared-expert": "use --moe-shared-expert-intermediate-size",
    "--n-shared-experts": "use --moe-shared-expert-intermediate-size",
    "--num-shared-experts": "use --moe-shared-expert-intermediate-size",
    "--shared-moe-ffn-hidden-size": "use --moe-shared-expert-intermediate-size",
    "--shared-expert-gate": "use --moe-shared-expert-gate",
    "--routed-scaling-factor": "use --moe-router-topk-scaling-factor",
    "--seq-aux": "use --moe-router-load-balancing-type seq_aux_loss",
    "--z-loss-weight": "use --z-loss-coeff",
    "--topk-softmax-in-fp32": "use --moe-router-dtype fp32",
    "--router-gating-in-fp32": "use --moe-router-dtype fp32",
    "--sliding-window": "config.json says it",
    "--intermediate-size": "use --ffn-hidden-size",
    "--n-head-kv": "use --group-query-attention --num-query-groups",
    "--use-llama2-rotary-position-embeddings": "use --position-embedding-type rope",
    "--use-mistral-rotary-position-embeddings": "use --position-embedding-type rope",
    "--use-wandb": "use --wandb-project",
    "--use-deter-comp": "use --deterministic-mode",
    "--fsdp2-config-path": "use --data-parallel-sharding-strategy optim_grads_params",
    "--hf-save-dir": "hf/ lies in --save",
    "--mg-save-dir": "use --save",
    "--train-data": "use --train-data-path",
    "--valid-data": "use --valid-data-path",
    "--input": "use --data-path, which takes raw text, too",
    "--output-prefix": "use --data-cache-path",
    "--optimizer-offload-policy": "use --optimizer-cpu-offload --optimizer-offload-fraction",
    "--optimizer-offload-auto-threshold": "use --optimizer-cpu-offload --optimizer-offload-fraction",
    "--optimizer-offload-chunk-size": "use --optimizer-cpu-offload --optimizer-offload-fraction",
}
"""Refused: flag -> remedy."""

SUITES_ACCEPTED: dict[str, str] = {
    "masks are never built": "--attention-mask-on-cpu",
    "a kernel chooses its own layout": "--shape-order=1 --megatron-cp-in-bnsd",
    "PyTorch's own parallel engine has no such setting": "--hccl-group-buffer=1",
    "every checkpoint has a list of hashes of its files": "--md5-validate",
    "it changes how fast adapters are, not what they compute": "--lora-fusion",
    "weights are held in fp32": "--rmsnorm-weight-in-fp32",
    "there is one model implementation": "--use-te",
    "config.json says how many rows there are": "--extra-vocab-size=1 --no-pad-vocab-size",
    "the tokenizer's folder says what it is": "--patch-tokenizer-type=1",
    "raw data is tokenized by itself, each text with an end": "--workers=1 --append-eod",
    "hf/ is written once, at the end, without --save-hf-interval": "--only-convert-last-checkpoint",
    "timers cost nothing to speak of and are always on": "--transformer-timers",
    "parameters keep their order": "--no-use-layer-wise-param-layout",
}
"""Without effect: reason -> flags, `=N` after one with N values."""
