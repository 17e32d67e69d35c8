#!/bin/bash
# Llama 3 8B: a dialogue.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama3_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-8b-hf/}"
: "${NPUS_PER_NODE:=1}" "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
: "${PROMPT_TYPE:=llama3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
chat --temperature 0.6 --top-p 0.9 "$@"
