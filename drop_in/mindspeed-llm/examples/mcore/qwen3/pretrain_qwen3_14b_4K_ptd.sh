#!/bin/bash
# Qwen3 14B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen3_14b_4K_ptd}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-14b-hf/}"
: "${TP:=8}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=4}" "${GBS:=128}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --use-distributed-optimizer --overlap-param-gather --use-ascend-coc --seed 42 \
    --context-parallel-algo ulysses_cp_algo "$@"
