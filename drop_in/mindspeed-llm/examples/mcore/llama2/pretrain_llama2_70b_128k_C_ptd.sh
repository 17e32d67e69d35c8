#!/bin/bash
# Llama 2 70B: pretraining.
: "${CKPT_LOAD_DIR=./model_weights/llama2-mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/pretrain_llama2_70b_128k_C_ptd}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-70b-hf/}"
: "${NPUS_PER_NODE:=16}" "${NNODES:=8}" "${TP:=8}" "${PP:=2}" "${CP:=8}"
: "${VPP=2}"
: "${SEQ_LEN:=131072}" "${MBS:=1}" "${GBS:=4}" "${TRAIN_ITERS:=5000}"
: "${SPLIT:=949,50,1}" "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=5000}" "${LR:=1.0e-6}"
: "${MIN_LR:=1.0e-7}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
pretrain --context-parallel-algo megatron_cp_algo --overlap-param-gather --use-distributed-optimizer \
    --adam-eps 1e-5 --swap-attention --recompute-activation-function "$@"
