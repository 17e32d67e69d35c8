#!/bin/sh
# MODEL_SIZE SRC DST TP PP PR USE_TE MG2HF [HF_DIR]: to torch, and back from any format.
exec "${PYTHON:-python}" -m tessel drop-in pai hf2mcore_qwen2.5_convertor.sh "$@"
