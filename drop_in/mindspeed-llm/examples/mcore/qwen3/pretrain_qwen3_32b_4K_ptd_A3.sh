#!/bin/bash
# Qwen3 32B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_qwen3_32b_4K_ptd_A3}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-32b-hf/}"
: "${NPUS_PER_NODE:=16}" "${TP:=8}" "${PP:=2}"
: "${VPP=4}"
: "${SEQ_LEN:=4096}" "${MBS:=2}" "${GBS:=256}" "${TRAIN_ITERS:=2000}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --reset-attention-mask --use-ascend-coc --use-distributed-optimizer --overlap-param-gather \
    --seed 42 "$@"
