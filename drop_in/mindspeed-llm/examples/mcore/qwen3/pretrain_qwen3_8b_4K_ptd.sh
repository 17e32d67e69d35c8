#!/bin/bash
# Qwen3 8B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen3_8b_4K_ptd}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-8b-hf/}"
: "${TP:=1}" "${PP:=2}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --use-distributed-optimizer --overlap-param-gather --seed 42 "$@"
