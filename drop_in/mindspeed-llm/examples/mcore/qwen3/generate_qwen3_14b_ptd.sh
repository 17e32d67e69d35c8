#!/bin/bash
# Qwen3 14B: texts.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-14b-hf/}"
: "${NPUS_PER_NODE:=4}" "${TP:=4}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
