#!/bin/bash
# Llama 2 13B: texts, with an adapter that is not merged.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-legacy/}}"
: "${CHECKPOINT_LORA:=./ckpt/tune_llama2_13b_lora_ptd}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-13b-hf/}}"
: "${TP:=8}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../examples.sh"
generate "$@"
