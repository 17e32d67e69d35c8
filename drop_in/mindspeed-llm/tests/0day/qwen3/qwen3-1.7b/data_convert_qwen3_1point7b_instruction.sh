#!/bin/bash
# Qwen3: dialogues for fine-tuning.
: "${INPUT:=../dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}"
: "${TOKENIZER_PATH:=../qwen3-1point7b-base}"
: "${OUTPUT_PREFIX:=../dataset/alpaca}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../../examples.sh"
dialogues --handler-name AlpacaStyleInstructionHandler --prompt-type qwen "$@"
