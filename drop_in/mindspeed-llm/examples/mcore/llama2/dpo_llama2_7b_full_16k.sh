#!/bin/bash
# Llama 2 7B: preferences (DPO).
: "${CKPT_LOAD_DIR=./model_weights/llama2-mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/dpo_llama2_7b_full_16k}"
: "${DATA_PATH:=./pairwise_dataset/orca_rlhf}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-7b-hf/}"
: "${TP:=8}" "${PP:=1}"
: "${SEQ_LEN:=16384}" "${MBS:=1}" "${GBS:=16}" "${TRAIN_ITERS:=5000}"
: "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=1000}" "${PROMPT_TYPE:=llama2}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
prefer --use-distributed-optimizer "$@"
