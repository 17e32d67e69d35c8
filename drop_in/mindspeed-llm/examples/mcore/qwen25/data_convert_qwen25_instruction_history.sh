#!/bin/bash
# Qwen2.5: dialogues for fine-tuning.
: "${INPUT:=./dataset/AlpacaHistroy-oaast-selected-0000.parquet}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-7b-hf/}"
: "${OUTPUT_PREFIX:=./finetune_dataset/alpaca}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
dialogues --handler-name AlpacaStyleInstructionHandler --prompt-type qwen \
    --map-keys '{"prompt":"instruction","query":"input","response":"output", "history":"history"}' "$@"
