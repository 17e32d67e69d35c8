#!/bin/bash
# Qwen2.5: a checkpoint of Megatron, cut anyhow, with an adapter -> mg2hf/ in the original folder.
: "${LOAD_DIR:=./model_weights/qwen2.5_mcore/}"
: "${CHECKPOINT_LORA:=./ckpt/tune_qwen25_7b_lora_ptd}"
: "${SAVE_DIR:=./model_from_hf/qwen2.5-7b-hf/}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
to_hugging_face convert_ckpt.py --lora-r 8 --lora-alpha 16 \
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 "$@"
