#!/bin/bash
# Llama 2: pairs of answers for preferences.
: "${INPUT:=./dataset/orca_rlhf.jsonl}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-7b-hf/}"
: "${OUTPUT_PREFIX:=./pairwise_dataset/orca_rlhf}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
dialogues --handler-name AlpacaStylePairwiseHandler --prompt-type llama2 --seq-length 4096 \
    --map-keys '{"prompt":"question", "query":"", "system":"system"}' "$@"
