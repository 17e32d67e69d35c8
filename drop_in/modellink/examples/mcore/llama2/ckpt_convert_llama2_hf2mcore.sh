#!/bin/bash
# Llama 2 -> Megatron's torch format. The legacy tree's script does it: to tessel, mcore and legacy are the same model.
export SAVE_DIR="${SAVE_DIR:-./model_weights/llama2-mcore/}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../llama2/ckpt_convert_llama2_hf2legacy.sh" --use-mcore-models "$@"
