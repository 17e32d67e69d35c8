#!/bin/bash
# Qwen2.5: a checkpoint of Megatron, cut anyhow -> mg2hf/ in the original folder.
: "${LOAD_DIR:=./model_weights/qwen2.5_mcore/}"
: "${SAVE_DIR:=./model_from_hf/qwen2.5-7b-hf/}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
to_hugging_face convert_ckpt.py "$@"
