#!/bin/bash
# Qwen3: a Hugging Face folder -> the torch format of Megatron.
: "${LOAD_DIR:=./model_from_hf/qwen3-235b-a22b-hf/}"
: "${SAVE_DIR:=./model_weights/qwen3_moe_mcore/}"
: "${TP:=1}" "${PP:=4}" "${EP:=32}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
to_megatron convert_ckpt_v2.py --num-layers-per-virtual-pipeline-stage 8 --noop-layers 94,95 \
    --moe-grouped-gemm "$@"
