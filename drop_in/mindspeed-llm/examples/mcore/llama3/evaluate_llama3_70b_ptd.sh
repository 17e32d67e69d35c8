#!/bin/bash
# Llama 3 70B: questions of TASK.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama3_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-70b-hf/}"
: "${TASK:=mmlu}" "${DATA_PATH:=./mmlu/test}"
: "${TP:=8}" "${PP:=1}" "${MAX_NEW_TOKENS:=1}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
evaluate --no-chat-template "$@"
