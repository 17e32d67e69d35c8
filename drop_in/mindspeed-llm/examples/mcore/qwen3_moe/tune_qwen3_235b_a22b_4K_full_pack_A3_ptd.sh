#!/bin/bash
# Qwen3 235B-A22B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen3_235b_a22b_4K_full_pack_A3_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-235b-a22b-hf/}"
: "${NPUS_PER_NODE:=16}" "${NNODES:=16}" "${TP:=2}" "${PP:=4}" "${EP:=32}"
: "${VPP=8}" "${NOOP_LAYERS=94,95}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=1024}" "${TRAIN_ITERS:=2000}"
: "${LR:=1.25e-5}" "${MIN_LR:=1.25e-7}" "${PROMPT_TYPE:=qwen3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --reset-attention-mask --neat-pack --moe-router-load-balancing-type aux_loss \
    --moe-aux-loss-coeff 0.001 --use-distributed-optimizer --overlap-param-gather \
    --recompute-granularity full --recompute-method block --recompute-num-layers 12 --seed 42 \
    --context-parallel-algo megatron_cp_algo "$@"
