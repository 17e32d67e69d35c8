#!/bin/bash
# Llama 2: a checkpoint of Megatron, cut anyhow -> mg2hg/ in the original folder.
: "${LOAD_DIR:=./model_weights/llama2-legacy/}"
: "${SAVE_DIR:=./model_from_hf/llama2-hf/}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../examples.sh"
to_hugging_face tools/checkpoint/convert_ckpt.py "$@"
