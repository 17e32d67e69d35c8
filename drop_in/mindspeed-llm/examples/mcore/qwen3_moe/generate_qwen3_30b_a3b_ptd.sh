#!/bin/bash
# Qwen3 30B-A3B: texts.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen3_moe_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-30b-a3b-hf/}"
: "${TP:=1}" "${PP:=8}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
