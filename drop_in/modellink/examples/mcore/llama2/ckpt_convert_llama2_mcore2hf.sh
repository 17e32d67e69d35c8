#!/bin/bash
# A checkpoint of Megatron -> mg2hg/ in the original folder. The legacy tree's script does it: to tessel, mcore and legacy are the same model.
export LOAD_DIR="${LOAD_DIR:-./model_weights/llama2-mcore/}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../llama2/ckpt_convert_llama2_legacy2hf.sh" "$@"
