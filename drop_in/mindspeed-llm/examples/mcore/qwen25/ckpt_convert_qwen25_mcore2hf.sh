#!/bin/bash
# A checkpoint of Megatron, cut anyhow -> mg2hf/ in the original Hugging Face folder.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
source "$ROOT/../lib.sh"

: "${LOAD_DIR:=./model_weights/qwen2.5_mcore/}"
: "${SAVE_DIR:=./model_from_hf/qwen2.5-7b-hf/}"

device_environment
program convert_ckpt.py \
    --use-mcore-models \
    --model-type GPT \
    --load-model-type mg \
    --save-model-type hf \
    --load-dir "$LOAD_DIR" \
    --save-dir "$SAVE_DIR" "$@"
made "${SAVE_DIR%/}/mg2hf"
