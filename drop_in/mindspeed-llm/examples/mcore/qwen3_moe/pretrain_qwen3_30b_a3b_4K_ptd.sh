#!/bin/bash
# Qwen3 30B-A3B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen3_30b_a3b_4K_ptd}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-30b-a3b-hf/}"
: "${NNODES:=2}" "${TP:=1}" "${PP:=2}" "${EP:=8}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=256}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001 --use-distributed-optimizer \
    --recompute-method uniform --recompute-granularity full --recompute-num-layers 1 --seed 42 \
    --context-parallel-algo ulysses_cp_algo "$@"
