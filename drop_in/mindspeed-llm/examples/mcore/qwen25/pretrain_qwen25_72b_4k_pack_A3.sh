#!/bin/bash
# Qwen2.5 72B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen25_72b_4k_pack_A3}"
: "${DATA_PATH:=./dataset/alpaca_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-72b-hf/}"
: "${NPUS_PER_NODE:=16}" "${NNODES:=4}" "${TP:=8}" "${PP:=2}"
: "${VPP=5}"
: "${SEQ_LEN:=4096}" "${MBS:=2}" "${GBS:=256}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --swap-attention --seed 42 --use-distributed-optimizer --use-precision-aware-optimizer \
    --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 --grad-reduce-in-bf16 --reset-attention-mask \
    --recompute-activation-function "$@"
