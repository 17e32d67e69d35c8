#!/bin/bash
# Qwen3 30B-A3B: preferences (DPO).
: "${CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/dpo_qwen3_30b_a3b_16K_A3_ptd}"
: "${DATA_PATH:=./pairwise_dataset/orca_rlhf}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-30b-a3b-hf/}"
: "${NPUS_PER_NODE:=16}" "${NNODES:=2}" "${TP:=2}" "${PP:=8}"
: "${SEQ_LEN:=16384}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=2000}"
: "${LR:=5e-8}" "${MIN_LR:=0}" "${LR_DECAY_STYLE:=constant}" "${LR_WARMUP_FRACTION:=0.0}"
: "${WEIGHT_DECAY:=0.0}" "${ADAM_BETA2:=0.999}" "${PROMPT_TYPE:=qwen3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
prefer --no-shuffle --deterministic-mode --moe-router-load-balancing-type aux_loss \
    --moe-aux-loss-coeff 0.001 --use-distributed-optimizer --seed 42 \
    --context-parallel-algo megatron_cp_algo --no-pad-to-seq-lengths --pad-to-multiple-of 2 \
    --recompute-granularity full --recompute-method block --recompute-num-layers 4 "$@"
