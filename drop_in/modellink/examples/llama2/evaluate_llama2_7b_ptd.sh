#!/bin/bash
# Questions of TASK, judged by what the model writes; --rule choice as an argument judges by likelihood.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$ROOT/../lib.sh"

: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-legacy}}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-hf/}}"
: "${DATA_PATH:=./mmlu/data/test/}"
: "${TASK:=mmlu}"
: "${TP:=8}"
: "${PP:=1}"

device_environment
logged "${LOG_NAME:-evaluate_llama2_7b}_$TASK" processes evaluation.py \
    --task "$TASK" \
    --task-data-path "$DATA_PATH" \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --max-new-tokens 1 \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --load "$CHECKPOINT" "$@"
made "logs/${LOG_NAME:-evaluate_llama2_7b}_$TASK.log"
