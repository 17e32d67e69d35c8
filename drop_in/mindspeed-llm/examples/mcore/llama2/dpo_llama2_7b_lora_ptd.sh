#!/bin/bash
# Llama 2 7B: preferences (DPO), adapters alone.
: "${CKPT_LOAD_DIR=./model_weights/llama2-mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/dpo_llama2_7b_lora_ptd}"
: "${DATA_PATH:=./pairwise_dataset/orca_rlhf}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-7b-hf/}"
: "${TP:=1}" "${PP:=2}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=256}" "${TRAIN_ITERS:=5000}"
: "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=1000}" "${PROMPT_TYPE:=llama2}" "${LORA_R:=16}"
: "${LORA_ALPHA:=32}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
prefer --no-pad-to-seq-lengths --use-distributed-optimizer "$@"
