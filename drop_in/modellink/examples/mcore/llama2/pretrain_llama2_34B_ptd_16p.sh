#!/bin/bash
# Llama 2 34B: pretraining.
: "${CKPT_LOAD_DIR=${CHECKPOINT-./model_weights/llama2-mcore/}}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_llama2_34B_ptd_16p}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-34b-hf/}}"
: "${NNODES:=2}" "${TP:=8}" "${PP:=2}"
: "${SEQ_LEN:=4096}" "${MBS:=2}" "${GBS:=1024}" "${TRAIN_ITERS:=2000}"
: "${SPLIT:=949,50,1}" "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=1000}" "${LR:=1.0e-7}"
: "${MIN_LR:=1.0e-8}" "${WEIGHT_DECAY:=1e-2}" "${ADAM_BETA2:=0.999}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --use-mc2 "$@"
