#!/bin/bash
# Qwen2.5 7B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/qwen25-7b}"
: "${DATA_PATH:=./dataset/alpaca_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-7b-hf/}"
: "${TP:=1}" "${PP:=4}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=2000}"
: "${LOG_NAME:=pretrain_mcore_qwen25_7b_32k}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --seed 1234 "$@"
