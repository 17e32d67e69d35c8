#!/bin/bash
# Llama 2: a Hugging Face folder -> the torch format of Megatron, frozen weights in NF4.
: "${LOAD_DIR:=./model_from_hf/llama-2-7b-hf/}"
: "${SAVE_DIR:=./model_weights/llama2-mcore-qlora/}"
: "${TP:=2}" "${PP:=1}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
to_megatron convert_ckpt.py --qlora-nf4 "$@"
