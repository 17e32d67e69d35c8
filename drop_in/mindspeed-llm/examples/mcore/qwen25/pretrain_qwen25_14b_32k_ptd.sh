#!/bin/bash
# Qwen2.5 14B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen25_14b_32k_ptd}"
: "${DATA_PATH:=./dataset/alpaca_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-14b-hf/}"
: "${NNODES:=2}" "${TP:=8}" "${PP:=2}"
: "${SEQ_LEN:=32768}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --use-ascend-coc --seed 42 "$@"
