#!/bin/bash
# INPUT TOKENIZER SEQ_LEN OUTPUT_PREFIX LOAD_DIR [PACKING]: dialogues -> a dataset for SFT=true.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$ROOT/../lib.sh"

[ $# -ge 5 ] || { say "5 arguments are needed, INPUT TOKENIZER SEQ_LEN OUTPUT_PREFIX LOAD_DIR, and $# are given: $*"; exit 2; }
packing=()
[ "${6:-false}" = true ] && packing=(--sequence-packing)
program toolkits/sft_data_preprocessing/build_idxmap_sft_dataset.py \
    --input "$1" \
    --output-prefix "$4" \
    --patch-tokenizer-type "$2" \
    --seq-length "$3" \
    --load "$5" \
    --workers 2 "${packing[@]}"
made "$4"
