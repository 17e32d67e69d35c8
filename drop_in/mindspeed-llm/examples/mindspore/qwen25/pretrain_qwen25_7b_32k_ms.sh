#!/bin/bash
# MindSpore's script of this name: that of examples/mcore, trained by MindSpore where it is installed.
# AI_FRAMEWORK=pytorch trains by PyTorch all the same. Checkpoints are the same, and either goes on from the other's.
: "${PYTHON:=python}"
if [ -z "${AI_FRAMEWORK:-}" ]; then
    AI_FRAMEWORK=mindspore
    "$PYTHON" -c 'from importlib.metadata import version; version("mindspore")' 2>/dev/null || AI_FRAMEWORK=pytorch
fi
[ "$AI_FRAMEWORK" = mindspore ] ||
    echo "drop-in: PyTorch trains; with MindSpore installed (pip install 'tessel[mindspore]') it would" >&2
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../mcore/qwen25/pretrain_qwen25_7b_32k_ptd.sh" \
    --ai-framework "$AI_FRAMEWORK" "$@"
