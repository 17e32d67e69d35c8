#!/bin/bash
# Qwen3 0.6B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen3_0point6b_4K_ptd}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-0.6b-hf/}"
: "${TP:=1}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --seed 42 --use-distributed-optimizer --seed 42 "$@"
