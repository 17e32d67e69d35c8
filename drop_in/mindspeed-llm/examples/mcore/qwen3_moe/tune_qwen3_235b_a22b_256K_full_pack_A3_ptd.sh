#!/bin/bash
# Qwen3 235B-A22B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen3_235b_a22b_256K_full_pack_A3_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-235b-a22b-hf/}"
: "${NPUS_PER_NODE:=16}" "${NNODES:=32}" "${TP:=4}" "${PP:=8}" "${CP:=16}" "${EP:=16}"
: "${VPP=3}" "${NOOP_LAYERS=94,95}"
: "${SEQ_LEN:=262144}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
: "${LR:=12e-6}" "${MIN_LR:=12e-7}" "${LR_WARMUP_FRACTION:=0.005}" "${PROMPT_TYPE:=qwen3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --reset-attention-mask --neat-pack --moe-router-load-balancing-type aux_loss \
    --moe-aux-loss-coeff 0.001 --expert-tensor-parallel-size 1 --use-distributed-optimizer \
    --overlap-param-gather --recompute-granularity full --recompute-method uniform \
    --recompute-num-layers 1 --swap-optimizer --seed 42 --context-parallel-algo ulysses_cp_algo "$@"
