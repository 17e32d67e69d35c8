#!/bin/bash
# Qwen2.5: a Hugging Face folder -> the torch format of Megatron.
: "${LOAD_DIR:=./model_from_hf/qwen2.5-7b-hf/}"
: "${SAVE_DIR:=./model_weights/qwen2.5_mcore/}"
: "${TP:=1}" "${PP:=4}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
to_megatron convert_ckpt.py "$@"
