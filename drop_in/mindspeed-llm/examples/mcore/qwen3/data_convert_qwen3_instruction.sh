#!/bin/bash
# Qwen3: dialogues for fine-tuning.
: "${INPUT:=./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-8b-hf/}"
: "${OUTPUT_PREFIX:=./finetune_dataset/alpaca}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
dialogues --handler-name AlpacaStyleInstructionHandler --enable-thinking true --prompt-type qwen3 "$@"
