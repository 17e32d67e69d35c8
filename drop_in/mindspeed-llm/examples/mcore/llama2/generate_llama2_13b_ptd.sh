#!/bin/bash
# Llama 2 13B: texts.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-13b-hf/}"
: "${NPUS_PER_NODE:=1}" "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
