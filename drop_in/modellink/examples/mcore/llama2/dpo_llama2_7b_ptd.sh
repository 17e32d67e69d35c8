#!/bin/bash
# Llama 2 7B: preferences (DPO).
: "${CKPT_LOAD_DIR=${CHECKPOINT-./model_weights/llama2-mcore/}}"
: "${CKPT_SAVE_DIR:=./ckpt/dpo_llama2_7b_ptd}"
: "${DATA_PATH:=./pairwise_dataset/orca_rlhf}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-hf/}}"
: "${TP:=2}" "${PP:=4}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=256}" "${TRAIN_ITERS:=5000}"
: "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=1000}" "${PROMPT_TYPE:=llama2}"
TRAINER=pretrain_gpt.py
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
prefer --use-distributed-optimizer --variable-seq-lengths "$@"
