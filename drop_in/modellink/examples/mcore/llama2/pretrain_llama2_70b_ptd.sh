#!/bin/bash
# Llama 2 70B: pretraining.
: "${CKPT_LOAD_DIR=${CHECKPOINT-./model_weights/llama2-mcore/}}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_llama2_70b_ptd}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-70b-hf/}}"
: "${NNODES:=4}" "${TP:=8}" "${PP:=4}"
: "${VPP=5}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=1024}" "${TRAIN_ITERS:=2000}"
: "${SPLIT:=949,50,1}" "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=1000}" "${LR:=1.0e-6}"
: "${MIN_LR:=1.0e-7}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --use-mc2 --adam-eps 1e-5 "$@"
