#!/bin/sh
# Training of Qwen3 by Pai's 27 arguments, which are checked one by one; MP_* variables are Pai's.
exec "${PYTHON:-python}" -m tessel drop-in pai run_mcore_qwen3.sh "$@"
