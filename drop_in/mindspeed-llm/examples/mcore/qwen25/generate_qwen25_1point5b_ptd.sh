#!/bin/bash
# Qwen2.5 1.5B: texts.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen2.5_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-1.5b-hf/}"
: "${NPUS_PER_NODE:=1}" "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
