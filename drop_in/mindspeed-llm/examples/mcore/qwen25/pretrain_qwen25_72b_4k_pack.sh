#!/bin/bash
# Qwen2.5 72B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen25_72b_4k_pack}"
: "${DATA_PATH:=./dataset/alpaca_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-72b-hf/}"
: "${NNODES:=4}" "${TP:=8}" "${PP:=4}"
: "${VPP=4}"
: "${SEQ_LEN:=4096}" "${MBS:=2}" "${GBS:=128}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --recompute-activation-function --swap-attention --seed 42 --use-distributed-optimizer \
    --overlap-param-gather --reset-attention-mask --use-ascend-coc --recompute-activation-function "$@"
