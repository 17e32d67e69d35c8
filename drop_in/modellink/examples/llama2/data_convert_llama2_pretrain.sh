#!/bin/bash
# Text -> PREFIX_text_document.bin and .idx.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$ROOT/../lib.sh"

: "${INPUT:=./dataset/train-00000-of-00042-d964455e17e96d5a.parquet}"
: "${TOKENIZER_PATH:=./model_from_hf/llama2-hf}"
: "${OUTPUT_PREFIX:=./dataset/enwiki}"
: "${WORKERS:=4}"

device_environment
mkdir -p "$(dirname "$OUTPUT_PREFIX")"
program preprocess_data.py \
    --input "$INPUT" \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --tokenizer-type PretrainedFromHF \
    --handler-name GeneralPretrainHandler \
    --output-prefix "$OUTPUT_PREFIX" \
    --json-keys text \
    --workers "$WORKERS" \
    --log-interval 1000 "$@"
made "${OUTPUT_PREFIX}_text_document"
