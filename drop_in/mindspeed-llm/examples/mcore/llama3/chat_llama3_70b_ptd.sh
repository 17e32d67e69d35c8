#!/bin/bash
# Llama 3 70B: a dialogue.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama3_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-70b-hf/}"
: "${NPUS_PER_NODE:=4}" "${TP:=4}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
: "${PROMPT_TYPE:=llama3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
chat --temperature 0.6 --top-p 0.9 "$@"
