#!/bin/bash
# Llama 2 70B: a dialogue.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-mcore/}}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-70b-hf/}}"
: "${TP:=8}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
: "${PROMPT_TYPE:=llama2}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
chat --add-eos-token '<|eot_id|>' --temperature 1 --top-p 0.9 "$@"
