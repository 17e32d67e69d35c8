#!/bin/bash
# Qwen2.5 7B: texts, with an adapter that is not merged.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen2.5_mcore/}}"
: "${CHECKPOINT_LORA:=./ckpt/tune_qwen25_7b_lora_ptd}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-7b-hf/}"
: "${TP:=1}" "${PP:=8}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
generate "$@"
