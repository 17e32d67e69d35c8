#!/bin/bash
# Llama 2 7B: questions of TASK.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-mcore/}}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-hf/}}"
: "${TASK:=human_eval}" "${DATA_PATH:=./human_eval}"
: "${NPUS_PER_NODE:=1}" "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=200}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
evaluate "$@"
