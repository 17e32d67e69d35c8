#!/bin/bash
# Qwen3 235B-A22B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen3_235b_a22b_64K_full_pack_A3_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-235b-a22b-hf/}"
: "${NPUS_PER_NODE:=16}" "${NNODES:=16}" "${TP:=2}" "${PP:=4}" "${CP:=8}" "${EP:=32}"
: "${VPP=8}" "${NOOP_LAYERS=94,95}"
: "${SEQ_LEN:=65536}" "${MBS:=1}" "${GBS:=16}" "${TRAIN_ITERS:=2000}"
: "${LR:=12e-6}" "${MIN_LR:=12e-7}" "${LR_WARMUP_FRACTION:=0.005}" "${PROMPT_TYPE:=qwen3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --reset-attention-mask --neat-pack --moe-router-load-balancing-type aux_loss \
    --moe-aux-loss-coeff 0.001 --use-distributed-optimizer --overlap-param-gather --recompute-method block \
    --recompute-granularity full --recompute-num-layers 8 --swap-optimizer --expert-tensor-parallel-size 1 \
    --manual-gc --manual-gc-interval 10 --seed 42 --context-parallel-algo ulysses_cp_algo "$@"
