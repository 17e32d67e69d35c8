#!/bin/bash
# Llama 2 7B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/llama2-mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_llama2_7b_pack_ptd_o2}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-7b-hf/}"
: "${TP:=1}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=128}" "${TRAIN_ITERS:=5000}"
: "${SPLIT:=949,50,1}" "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=1000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --grad-reduce-in-bf16 --reset-attention-mask --use-distributed-optimizer --overlap-param-gather "$@"
