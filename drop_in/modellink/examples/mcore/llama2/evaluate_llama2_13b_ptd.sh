#!/bin/bash
# Llama 2 13B: questions of TASK.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-mcore/}}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-13b-hf/}}"
: "${TASK:=boolq}" "${DATA_PATH:=./boolq/test}"
: "${TP:=8}" "${PP:=1}" "${MAX_NEW_TOKENS:=1}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
evaluate "$@"
