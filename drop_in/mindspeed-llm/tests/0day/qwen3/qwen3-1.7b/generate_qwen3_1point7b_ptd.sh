#!/bin/bash
# Qwen3 1.7B: texts.
: "${CHECKPOINT:=${CKPT_LOAD_DIR:-../qwen3-1point7b-mcore}}"
: "${TOKENIZER_PATH:=../qwen3-1point7b-base}"
: "${TP:=1}" "${PP:=1}" "${MAX_NEW_TOKENS:=256}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../../examples.sh"
generate "$@"
