#!/bin/bash
# Llama 3: prompts, as the suite's reinforcement learning reads them.
: "${INPUT:=./dataset/descriptiveness-00000-of-00001.parquet}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-8b-hf/}"
: "${OUTPUT_PREFIX:=./dataset/llama3-hf/descriptiveness}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
dialogues --handler-name PPOAlpacaStyleInstructionHandler --prompt-type llama3 \
    --map-keys '{"prompt":"prompt", "query":"", "response": "prompt", "system":""}' "$@"
