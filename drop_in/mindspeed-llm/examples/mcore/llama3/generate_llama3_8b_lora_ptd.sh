#!/bin/bash
# Llama 3 8B: texts, with an adapter that is not merged.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama3_mcore/}}"
: "${CHECKPOINT_LORA:=./ckpt/tune_llama3_8b_lora_ptd}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-8b-hf/}"
: "${TP:=1}" "${PP:=8}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
