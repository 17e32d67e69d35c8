#!/bin/bash
# Questions of TASK, judged by what the model writes; --rule choice as an argument judges by likelihood.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
source "$ROOT/../lib.sh"

: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen2.5_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-7b-hf/}"
: "${DATA_PATH:=./mmlu/test}"
: "${TASK:=mmlu}"
: "${TP:=1}"
: "${PP:=4}"

device_environment
logged "evaluation_mcore_qwen25_7b_$TASK" processes evaluation.py \
    --task "$TASK" \
    --task-data-path "$DATA_PATH" \
    --no-chat-template \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --max-new-tokens 1 \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --seed 42 \
    --load "$CHECKPOINT" "$@"
made "logs/evaluation_mcore_qwen25_7b_$TASK.log"
