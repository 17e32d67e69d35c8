#!/bin/bash
# Qwen3 1.7B: a Hugging Face folder -> the torch format of Megatron.
: "${LOAD_DIR:=../qwen3-1point7b-base}"
: "${SAVE_DIR:=../qwen3-1point7b-mcore}"
: "${TP:=1}" "${PP:=1}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../../examples.sh"
to_megatron convert_ckpt.py "$@"
