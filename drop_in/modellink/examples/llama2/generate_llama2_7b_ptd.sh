#!/bin/bash
# Texts of Llama2-7B: the suite's demonstrations, or --task and --prompt as arguments of this script.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$ROOT/../lib.sh"

: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/llama2-legacy/}}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-hf/}}"
: "${TP:=8}"
: "${PP:=1}"
: "${MAX_NEW_TOKENS:=256}"

device_environment
logged "${LOG_NAME:-generate_llama2_7b}" processes inference.py \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --max-new-tokens "$MAX_NEW_TOKENS" \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --load "$CHECKPOINT" "$@"
made "logs/${LOG_NAME:-generate_llama2_7b}.log"
