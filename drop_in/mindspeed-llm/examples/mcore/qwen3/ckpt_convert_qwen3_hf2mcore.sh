#!/bin/bash
# Qwen3: a Hugging Face folder -> the torch format of Megatron.
: "${LOAD_DIR:=./model_from_hf/qwen3-8b-hf/}"
: "${SAVE_DIR:=./model_weights/qwen3_mcore/}"
: "${TP:=1}" "${PP:=8}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
to_megatron convert_ckpt_v2.py "$@"
