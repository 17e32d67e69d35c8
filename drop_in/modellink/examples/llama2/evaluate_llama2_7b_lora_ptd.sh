#!/bin/bash
# Llama 2 7B: questions of TASK, to a model with an adapter that is not merged.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-legacy/}}"
: "${CHECKPOINT_LORA:=./ckpt/tune_llama2_7b_lora_ptd}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-hf/}}"
: "${TASK:=mmlu}" "${DATA_PATH:=./mmlu/data/test/}"
: "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=1}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../examples.sh"
evaluate "$@"
