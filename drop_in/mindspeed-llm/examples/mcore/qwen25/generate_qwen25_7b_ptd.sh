#!/bin/bash
# Texts of Qwen2.5-7B: the suite's demonstrations, or --task and --prompt as arguments of this script.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
source "$ROOT/../lib.sh"

: "${CHECKPOINT:=${CKPT_LOAD_DIR:-./model_weights/qwen2.5_mcore/}}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-7b-hf/}"
: "${TP:=1}"
: "${PP:=4}"
: "${MAX_NEW_TOKENS:=256}"

device_environment
logged generate_mcore_qwen25_7b processes inference.py \
    --tensor-model-parallel-size "$TP" \
    --pipeline-model-parallel-size "$PP" \
    --max-new-tokens "$MAX_NEW_TOKENS" \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --seed 42 \
    --load "$CHECKPOINT" "$@"
made "logs/generate_mcore_qwen25_7b.log"
