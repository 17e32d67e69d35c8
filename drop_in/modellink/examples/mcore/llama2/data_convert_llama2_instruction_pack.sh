#!/bin/bash
# Llama 2: dialogues for fine-tuning.
: "${INPUT:=./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-hf/}}"
: "${OUTPUT_PREFIX:=./finetune_dataset/alpaca}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
dialogues --handler-name AlpacaStyleInstructionHandler --prompt-type llama2 --pack --seq-length 4096 "$@"
