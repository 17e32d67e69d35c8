#!/bin/bash
# Llama 3 70B: texts.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama3_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-70b-hf/}"
: "${NPUS_PER_NODE:=4}" "${TP:=4}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
