#!/bin/bash
# Llama 2 13B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/llama2-mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_llama2_13b_pack_ptd}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-13b-hf/}"
: "${TP:=1}" "${PP:=4}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=128}" "${TRAIN_ITERS:=5000}"
: "${SPLIT:=949,50,1}" "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=1000}" "${LR:=1e-6}" "${MIN_LR:=1e-8}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --recompute-activation-function --recompute-granularity full --recompute-method block \
    --recompute-num-layers 1 --reset-attention-mask --use-distributed-optimizer "$@"
