#!/bin/bash
# Llama 2: a Hugging Face folder -> the torch format of Megatron.
: "${LOAD_DIR:=./model_from_hf/llama-2-7b-hf/}"
: "${SAVE_DIR:=./model_weights/llama2-mcore/}"
: "${TP:=8}" "${PP:=1}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
to_megatron convert_ckpt.py "$@"
