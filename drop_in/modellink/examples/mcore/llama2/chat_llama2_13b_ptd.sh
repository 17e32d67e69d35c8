#!/bin/bash
# Llama 2 13B: a dialogue.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-mcore/}}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-13b-hf/}}"
: "${NPUS_PER_NODE:=1}" "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
: "${PROMPT_TYPE:=llama2}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
chat --temperature 0.9 --top-p 0.6 "$@"
