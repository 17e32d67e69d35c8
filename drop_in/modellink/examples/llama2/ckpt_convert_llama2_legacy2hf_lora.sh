#!/bin/bash
# Llama 2: a checkpoint of Megatron, cut anyhow, with an adapter -> mg2hg/ in the original folder.
: "${LOAD_DIR:=./model_weights/llama2-legacy/}"
: "${CHECKPOINT_LORA:=./ckpt/tune_llama2_7b_lora_ptd}"
: "${SAVE_DIR:=./model_from_hf/llama2-hf/}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../examples.sh"
to_hugging_face tools/checkpoint/convert_ckpt.py --lora-r 8 --lora-alpha 16 \
    --lora-target-modules query_key_value dense dense_h_to_4h dense_4h_to_h "$@"
