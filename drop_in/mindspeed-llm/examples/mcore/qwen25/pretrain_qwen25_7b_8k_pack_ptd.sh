#!/bin/bash
# Qwen2.5 7B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen25_7b_8k_pack_ptd}"
: "${DATA_PATH:=./dataset/alpaca_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-7b-hf/}"
: "${TP:=1}" "${PP:=4}"
: "${NUM_LAYER_LIST=6,8,8,6}"
: "${SEQ_LEN:=8192}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=1000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --use-distributed-optimizer --reset-attention-mask --seed 1234 "$@"
