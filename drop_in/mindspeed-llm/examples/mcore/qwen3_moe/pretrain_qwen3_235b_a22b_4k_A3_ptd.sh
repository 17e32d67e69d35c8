#!/bin/bash
# Qwen3 235B-A22B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen3_235b_a22b_4k_A3_ptd}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-235b-a22b-hf/}"
: "${NPUS_PER_NODE:=16}" "${NNODES:=16}" "${TP:=1}" "${PP:=4}" "${EP:=32}"
: "${VPP=8}" "${NOOP_LAYERS=94,95}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=1024}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001 --use-distributed-optimizer \
    --overlap-param-gather --seed 42 --recompute-granularity full --recompute-method block \
    --recompute-num-layers 8 --context-parallel-algo megatron_cp_algo "$@"
