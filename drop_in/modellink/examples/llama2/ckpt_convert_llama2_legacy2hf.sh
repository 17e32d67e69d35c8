#!/bin/bash
# A checkpoint of Megatron, cut anyhow -> mg2hg/ in the original Hugging Face folder.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$ROOT/../lib.sh"

: "${LOAD_DIR:=./model_weights/llama2-legacy/}"
: "${SAVE_DIR:=./model_from_hf/llama2-hf/}"

device_environment
program tools/checkpoint/convert_ckpt.py \
    --model-type GPT \
    --loader megatron \
    --saver megatron \
    --save-model-type save_huggingface_llama \
    --load-dir "$LOAD_DIR" \
    --save-dir "$SAVE_DIR" "$@"
made "${SAVE_DIR%/}/mg2hg"
