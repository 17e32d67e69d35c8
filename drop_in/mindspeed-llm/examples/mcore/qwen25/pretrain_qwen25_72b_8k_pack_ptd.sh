#!/bin/bash
# Qwen2.5 72B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen25_72b_8k_pack_ptd}"
: "${DATA_PATH:=./dataset/alpaca_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-72b-hf/}"
: "${NNODES:=4}" "${TP:=8}" "${PP:=4}"
: "${VPP=4}"
: "${SEQ_LEN:=8192}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --seed 42 --use-distributed-optimizer --swap-attention --reset-attention-mask --use-ascend-coc "$@"
