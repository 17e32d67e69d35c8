#!/bin/bash
# Qwen3 30B-A3B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen3_30b_a3b_4K_A3_fsdp2}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-30b-a3b-hf/}"
: "${NPUS_PER_NODE:=16}" "${TP:=1}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001 --seed 42 \
    --data-parallel-sharding-strategy optim_grads_params "$@"
