#!/bin/bash
# Qwen3: a checkpoint of Megatron, cut anyhow -> mg2hf/ in the original folder.
: "${LOAD_DIR:=./model_weights/qwen3_moe_mcore/}"
: "${SAVE_DIR:=./model_from_hf/qwen3-30b-a3b-hf/}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
to_hugging_face convert_ckpt_v2.py "$@"
