#!/bin/bash
# Qwen3 30B-A3B: questions of TASK.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen3_moe_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-30b-a3b-hf/}"
: "${TASK:=mmlu}" "${DATA_PATH:=./mmlu/test}"
: "${TP:=4}" "${PP:=2}" "${MAX_NEW_TOKENS:=2}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
evaluate --no-chat-template "$@"
