#!/bin/bash
# Llama 2 34B: texts.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-34b-hf/}"
: "${TP:=8}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
