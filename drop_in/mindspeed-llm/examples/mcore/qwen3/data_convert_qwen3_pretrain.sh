#!/bin/bash
# Qwen3: texts for pretraining.
: "${INPUT:=./dataset/train-00000-of-00042-d964455e17e96d5a.parquet}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-8b-hf/}"
: "${OUTPUT_PREFIX:=./dataset/enwiki}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
texts --handler-name GeneralPretrainHandler --json-keys text "$@"
