#!/bin/bash
# Qwen2.5 3B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen25_3b_32k_ptd}"
: "${DATA_PATH:=./dataset/alpaca_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-3b-hf/}"
: "${TP:=1}" "${PP:=2}" "${CP:=4}"
: "${SEQ_LEN:=32768}" "${MBS:=1}" "${GBS:=16}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --context-parallel-algo megatron_cp_algo --use-distributed-optimizer --seed 42 "$@"
