#!/bin/bash
# A Hugging Face folder of Llama 2 -> the legacy format, cut for TP x PP processes.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$ROOT/../lib.sh"

: "${TP:=2}"
: "${PP:=4}"
: "${LOAD_DIR:=./model_from_hf/llama2-hf/}"
: "${SAVE_DIR:=./model_weights/llama2-legacy/}"

device_environment
program tools/checkpoint/convert_ckpt.py \
    --model-type GPT \
    --loader llama2_hf \
    --saver megatron \
    --target-tensor-parallel-size "$TP" \
    --target-pipeline-parallel-size "$PP" \
    --load-dir "$LOAD_DIR" \
    --save-dir "$SAVE_DIR" "$@"
made "$SAVE_DIR"
