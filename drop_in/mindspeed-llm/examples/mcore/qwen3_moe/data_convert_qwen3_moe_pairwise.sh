#!/bin/bash
# Qwen3: pairs of answers for preferences.
: "${INPUT:=./dataset/orca_rlhf.jsonl}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-30b-a3b-hf/}"
: "${OUTPUT_PREFIX:=./pairwise_dataset/orca_rlhf}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
dialogues --handler-name AlpacaStylePairwiseHandler --prompt-type qwen3 \
    --map-keys '{"prompt":"question", "query":"", "system":"system"}' "$@"
