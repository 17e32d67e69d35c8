#!/bin/bash
# Llama 2 7B: questions of TASK.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-7b-hf/}"
: "${TASK:=agieval}" "${DATA_PATH:=./agieval/test}"
: "${NPUS_PER_NODE:=1}" "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=1}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
evaluate "$@"
