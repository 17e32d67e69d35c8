#!/bin/bash
# Qwen2.5 7B: a dialogue.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen2.5_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-7b-hf/}"
: "${TP:=4}" "${PP:=2}" "${MAX_NEW_TOKENS:=256}"
: "${PROMPT_TYPE:=qwen}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
chat "$@"
