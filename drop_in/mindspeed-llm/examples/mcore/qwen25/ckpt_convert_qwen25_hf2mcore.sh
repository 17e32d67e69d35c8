#!/bin/bash
# A Hugging Face folder of Qwen2.5 -> Megatron's torch format, cut for TP x PP processes.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
source "$ROOT/../lib.sh"

: "${TP:=1}"
: "${PP:=4}"
: "${LOAD_DIR:=./model_from_hf/qwen2.5-7b-hf/}"
: "${SAVE_DIR:=./model_weights/qwen2.5_mcore/}"
: "${PARAMS_DTYPE:=bf16}"

device_environment
program convert_ckpt.py \
    --use-mcore-models \
    --model-type GPT \
    --load-model-type hf \
    --save-model-type mg \
    --target-tensor-parallel-size "$TP" \
    --target-pipeline-parallel-size "$PP" \
    --load-dir "$LOAD_DIR" \
    --save-dir "$SAVE_DIR" \
    --params-dtype "$PARAMS_DTYPE" "$@"
made "$SAVE_DIR"
