#!/bin/bash
# Text -> PREFIX_text_document.bin and .idx. The legacy tree's script does it: to tessel, mcore and legacy are the same model.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../llama2/data_convert_llama2_pretrain.sh" "$@"
