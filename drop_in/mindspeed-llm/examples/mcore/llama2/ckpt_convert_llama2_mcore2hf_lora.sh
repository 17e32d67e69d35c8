#!/bin/bash
# Llama 2: a checkpoint of Megatron, cut anyhow, with an adapter -> mg2hf/ in the original folder.
: "${LOAD_DIR:=./model_weights/llama2-mcore/}"
: "${CHECKPOINT_LORA:=./ckpt/tune_llama2_7b_lora_ptd}"
: "${SAVE_DIR:=./model_from_hf/llama-2-7b-hf/}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
to_hugging_face convert_ckpt.py --lora-r 16 --lora-alpha 32 \
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2 "$@"
