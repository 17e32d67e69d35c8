#!/bin/bash
# Qwen3 1.7B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=../qwen3-1point7b-mcore}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen3_1point7b_4K_full_ptd}"
: "${DATA_PATH:=../dataset/alpaca}"
: "${TOKENIZER_PATH:=../qwen3-1point7b-base}"
: "${TP:=1}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
: "${PROMPT_TYPE:=qwen}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../../examples.sh"
tune --seed 42 --variable-seq-lengths "$@"
