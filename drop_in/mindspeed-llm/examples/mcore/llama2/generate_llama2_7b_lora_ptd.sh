#!/bin/bash
# Llama 2 7B: texts, with an adapter that is not merged.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-mcore/}}"
: "${CHECKPOINT_LORA:=./ckpt/tune_llama2_7b_lora_ptd}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-7b-hf/}"
: "${TP:=8}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
