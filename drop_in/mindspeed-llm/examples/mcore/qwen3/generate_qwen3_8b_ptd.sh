#!/bin/bash
# Qwen3 8B: texts.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-8b-hf/}"
: "${TP:=1}" "${PP:=2}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
