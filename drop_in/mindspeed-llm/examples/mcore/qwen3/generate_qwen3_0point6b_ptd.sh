#!/bin/bash
# Qwen3 0.6B: texts.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-0.6b-hf/}"
: "${NPUS_PER_NODE:=1}" "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
