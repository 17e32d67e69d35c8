#!/bin/bash
# Qwen3 235B-A22B: texts.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen3_moe_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-235b-a22b-hf/}"
: "${NNODES:=2}" "${TP:=1}" "${PP:=2}" "${EP:=8}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
