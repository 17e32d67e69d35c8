#!/bin/bash
# Qwen2.5 14B: texts.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen2.5_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-14b-hf/}"
: "${TP:=4}" "${PP:=2}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
