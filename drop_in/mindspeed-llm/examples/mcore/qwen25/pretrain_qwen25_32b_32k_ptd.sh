#!/bin/bash
# Qwen2.5 32B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen25_32b_32k_ptd}"
: "${DATA_PATH:=./dataset/alpaca_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-32b-hf/}"
: "${NNODES:=4}" "${TP:=8}" "${PP:=4}"
: "${NUM_LAYER_LIST=11,13,19,21}"
: "${SEQ_LEN:=32768}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --use-distributed-optimizer --seed 42 "$@"
