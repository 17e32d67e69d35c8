#!/bin/bash
# Llama 2 13B: pretraining.
: "${CKPT_LOAD_DIR=${CHECKPOINT-./model_weights/llama2-legacy/}}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_llama2_13B_ptd_8p}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-13b-hf/}}"
: "${TP:=8}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=4}" "${GBS:=512}" "${TRAIN_ITERS:=5000}"
: "${SPLIT:=949,50,1}" "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=1000}" "${LR:=1e-6}" "${MIN_LR:=1e-8}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../examples.sh"
pretrain --use-mc2 "$@"
