#!/bin/bash
# INPUT TOKENIZER JSON_KEYS OUTPUT_DIR LOAD_DIR: text -> OUTPUT_DIR/mmap_..._datasets_KEY_document.bin and .idx.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$ROOT/../lib.sh"

[ $# -ge 5 ] || { say "5 arguments are needed, INPUT TOKENIZER JSON_KEYS OUTPUT_DIR LOAD_DIR, and $# are given: $*"; exit 2; }
name=$(echo "${2%Tokenizer}" | tr '[:upper:]' '[:lower:]')
prefix="$4/mmap_${name}_datasets"
mkdir -p "$4"
program toolkits/pretrain_data_preprocessing/preprocess_data_megatron.py \
    --input "$1" \
    --output-prefix "$prefix" \
    --patch-tokenizer-type "$2" \
    --json-keys "$3" \
    --load "$5" \
    --workers 2 \
    --append-eod
made "${prefix}_$3_document"
