#!/bin/bash
# Text -> PREFIX_text_document.bin and .idx by Qwen3's tokenizer.
export INPUT="${INPUT:-../dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}"
export TOKENIZER_PATH="${TOKENIZER_PATH:-../qwen3-1point7b-base}" OUTPUT_PREFIX="${OUTPUT_PREFIX:-../dataset/enwiki}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../../../examples/mcore/qwen25/data_convert_qwen25_pretrain.sh" \
    --handler-name GeneralPretrainHandler --json-keys text "$@"
