#!/bin/bash
# Qwen3: a checkpoint of Megatron, cut anyhow -> mg2hf/ in the original folder.
: "${LOAD_DIR:=../qwen3-1point7b-mcore}"
: "${SAVE_DIR:=../qwen3-1point7b-base}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../../examples.sh"
to_hugging_face convert_ckpt.py "$@"
