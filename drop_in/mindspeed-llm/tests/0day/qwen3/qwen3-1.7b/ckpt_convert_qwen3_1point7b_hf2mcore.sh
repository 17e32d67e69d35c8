#!/bin/bash
# Qwen3-1.7B-Base -> Megatron's torch format.
export LOAD_DIR="${LOAD_DIR:-../qwen3-1point7b-base}" SAVE_DIR="${SAVE_DIR:-../qwen3-1point7b-mcore}"
export TP="${TP:-1}" PP="${PP:-1}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../../../examples/mcore/qwen25/ckpt_convert_qwen25_hf2mcore.sh" "$@"
