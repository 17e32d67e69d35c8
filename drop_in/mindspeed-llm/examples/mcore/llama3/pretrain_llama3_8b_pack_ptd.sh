#!/bin/bash
# Llama 3 8B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/llama3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_llama3_8b_pack_ptd}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-8b-hf/}"
: "${TP:=2}" "${PP:=1}"
: "${SEQ_LEN:=8192}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --reset-attention-mask --use-distributed-optimizer --overlap-param-gather \
    --recompute-activation-function --recompute-activation-function-num-layers 16 "$@"
