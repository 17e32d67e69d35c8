#!/bin/bash
# Qwen3 235B-A22B: questions of TASK.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen3_moe_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-235b-a22b-hf/}"
: "${TASK:=mmlu}" "${DATA_PATH:=./mmlu/test}"
: "${NNODES:=2}" "${TP:=1}" "${PP:=2}" "${EP:=8}" "${MAX_NEW_TOKENS:=2}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
evaluate --no-chat-template "$@"
