#!/bin/bash
# Llama 3 70B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/llama3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_llama3_70b_ptd_pack}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-70b-hf/}"
: "${NNODES:=4}" "${TP:=8}" "${PP:=4}"
: "${VPP=2}"
: "${SEQ_LEN:=8192}" "${MBS:=1}" "${GBS:=256}" "${TRAIN_ITERS:=1000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --swap-attention --reset-attention-mask --use-distributed-optimizer --overlap-param-gather "$@"
