#!/bin/bash
# Qwen2.5 7B: a dialogue, with an adapter that is not merged.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen2.5_mcore/}}"
: "${CHECKPOINT_LORA:=./ckpt/tune_qwen25_7b_lora_ptd}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-7b-hf/}"
: "${NPUS_PER_NODE:=1}" "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
: "${PROMPT_TYPE:=qwen}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
chat "$@"
