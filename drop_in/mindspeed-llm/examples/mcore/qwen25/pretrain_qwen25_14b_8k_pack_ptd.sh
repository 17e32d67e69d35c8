#!/bin/bash
# Qwen2.5 14B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen25_14b_8k_pack_ptd}"
: "${DATA_PATH:=./dataset/alpaca_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-14b-hf/}"
: "${TP:=1}" "${PP:=8}"
: "${NUM_LAYER_LIST=4,6,7,7,7,7,6,4}"
: "${SEQ_LEN:=8192}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --recompute-activation-function --recompute-granularity full --recompute-method block \
    --recompute-num-layers 6 --seed 42 --reset-attention-mask --use-distributed-optimizer "$@"
