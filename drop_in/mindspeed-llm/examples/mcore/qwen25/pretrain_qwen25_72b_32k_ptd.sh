#!/bin/bash
# Qwen2.5 72B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen25_72b_32k_ptd}"
: "${DATA_PATH:=./dataset/alpaca_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-72b-hf/}"
: "${NNODES:=16}" "${TP:=8}" "${PP:=4}" "${CP:=4}"
: "${NUM_LAYER_LIST=17,20,22,21}"
: "${SEQ_LEN:=32768}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --context-parallel-algo megatron_cp_algo --seed 42 --use-distributed-optimizer --use-ascend-coc "$@"
