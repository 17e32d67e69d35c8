#!/bin/bash
# Llama 3: a checkpoint of Megatron, cut anyhow -> mg2hf/ in the original folder.
: "${LOAD_DIR:=./model_weights/llama3_mcore/}"
: "${SAVE_DIR:=./model_from_hf/llama-3-8b-hf/}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
to_hugging_face convert_ckpt.py "$@"
