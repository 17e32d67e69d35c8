#!/bin/sh
# MODEL_SIZE LOAD_DIR SAVE_DIR MG2HF USE_CUDA PR [HF_DIR]: to torch_dist, and back.
exec "${PYTHON:-python}" -m tessel drop-in pai run_8xH20_qwen3.sh "$@"
