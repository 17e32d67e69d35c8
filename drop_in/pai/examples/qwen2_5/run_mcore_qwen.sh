#!/bin/sh
# Training of Qwen2.5 by Pai's 25 arguments, which are checked one by one; MP_* variables are Pai's.
exec "${PYTHON:-python}" -m tessel drop-in pai run_mcore_qwen.sh "$@"
