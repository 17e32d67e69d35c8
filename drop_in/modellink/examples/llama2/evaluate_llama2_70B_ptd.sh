#!/bin/bash
# Llama 2 70B: questions of TASK.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-legacy/}}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-70b-hf/}}"
: "${TASK:=boolq}" "${DATA_PATH:=./boolq/test}"
: "${TP:=8}" "${PP:=1}" "${MAX_NEW_TOKENS:=1}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../examples.sh"
evaluate "$@"
