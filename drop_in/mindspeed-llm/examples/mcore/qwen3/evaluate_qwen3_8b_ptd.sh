#!/bin/bash
# Qwen3 8B: questions of TASK.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-8b-hf/}"
: "${TASK:=mmlu}" "${DATA_PATH:=./mmlu/test}"
: "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=2}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
evaluate --no-chat-template "$@"
