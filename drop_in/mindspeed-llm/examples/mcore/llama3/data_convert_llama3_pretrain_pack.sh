#!/bin/bash
# Llama 3: texts for pretraining.
: "${INPUT:=./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-8b-hf/}"
: "${OUTPUT_PREFIX:=./dataset/enwiki}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
texts --append-eod "$@"
