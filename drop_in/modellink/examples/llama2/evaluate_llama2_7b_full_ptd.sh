#!/bin/bash
# Llama 2 7B: questions of TASK.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-legacy/}}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-hf/}}"
: "${TASK:=mmlu}" "${DATA_PATH:=./mmlu/data/test/}"
: "${NPUS_PER_NODE:=1}" "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=10}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../examples.sh"
evaluate --prompt-type llama2 "$@"
