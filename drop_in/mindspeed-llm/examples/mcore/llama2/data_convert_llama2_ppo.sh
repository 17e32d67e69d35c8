#!/bin/bash
# Llama 2: prompts, as the suite's reinforcement learning reads them.
: "${INPUT:=./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-7b-hf/}"
: "${OUTPUT_PREFIX:=./finetune_dataset/alpaca}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
dialogues --handler-name PPOAlpacaStyleInstructionHandler --prompt-type llama2 "$@"
