#!/bin/bash
# Qwen3: a checkpoint of Megatron, cut anyhow -> a Hugging Face folder.
: "${LOAD_DIR:=./model_weights/qwen3_mcore/}"
: "${SAVE_DIR:=./hf_weights/qwen3-8b-hf/}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
to_hugging_face convert_ckpt_v2.py "$@"
