#!/bin/bash
# Llama 2: a Hugging Face folder -> the legacy format.
: "${LOAD_DIR:=./model_from_hf/llama2-hf/}"
: "${SAVE_DIR:=./model_weights/llama2-legacy/}"
: "${TP:=2}" "${PP:=4}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../examples.sh"
to_legacy tools/checkpoint/convert_ckpt.py "$@"
