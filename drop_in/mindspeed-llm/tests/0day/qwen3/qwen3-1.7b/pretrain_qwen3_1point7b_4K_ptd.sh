#!/bin/bash
# Qwen3 1.7B: pretraining; by the guide from random weights.
: "${CKPT_LOAD_DIR=}"
: "${CKPT_SAVE_DIR:=./ckpt}"
: "${DATA_PATH:=../dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=../qwen3-1point7b-base}"
: "${TP:=8}" "${PP:=1}"
: "${SEQ_LENGTH:=4096}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=2000}"
: "${LOG_NAME:=train_mcore_qwen3_1point7b}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../../examples.sh"
pretrain --use-distributed-optimizer --seed 42 --no-shared-storage "$@"
