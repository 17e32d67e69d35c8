#!/bin/bash
# Qwen3 1.7B: adapters beside a frozen model, on dialogues.
: "${CKPT_LOAD_DIR=../qwen3-1point7b-mcore}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen3_1point7b_4K_lora_ptd}"
: "${DATA_PATH:=../dataset/alpaca}"
: "${TOKENIZER_PATH:=../qwen3-1point7b-base}"
: "${TP:=1}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=16}" "${TRAIN_ITERS:=2000}"
: "${LR:=1.25e-5}" "${MIN_LR:=1.25e-7}" "${PROMPT_TYPE:=qwen}" "${LORA_R:=16}" "${LORA_ALPHA:=32}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../../examples.sh"
tune --use-distributed-optimizer --seed 42 --variable-seq-lengths "$@"
