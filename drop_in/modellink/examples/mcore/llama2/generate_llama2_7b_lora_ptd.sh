#!/bin/bash
# Texts of Llama2-7B with an adapter. The legacy tree's script does it: to tessel, mcore and legacy are the same model.
export CKPT_LOAD_DIR="${CKPT_LOAD_DIR-${CHECKPOINT-./model_weights/llama2-mcore/}}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../llama2/generate_llama2_7b_lora_ptd.sh" "$@"
