#!/bin/bash
# Text -> PREFIX_text_document.bin and .idx.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
source "$ROOT/../lib.sh"

: "${INPUT:=./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-7b-hf/}"
: "${OUTPUT_PREFIX:=./dataset/alpaca}"
: "${WORKERS:=4}"

device_environment
mkdir -p "$(dirname "$OUTPUT_PREFIX")"
program preprocess_data.py \
    --input "$INPUT" \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --output-prefix "$OUTPUT_PREFIX" \
    --tokenizer-type PretrainedFromHF \
    --workers "$WORKERS" \
    --log-interval 1000 "$@"
made "${OUTPUT_PREFIX}_text_document"
