#!/bin/bash
# MindSpore's script of this name. tessel runs on PyTorch on every device, so that the one of examples/mcore does it.
echo "drop-in: on PyTorch, not on MindSpore; files are those that PyTorch's script writes" >&2
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../mcore/qwen25/pretrain_qwen25_7b_32k_ptd.sh" "$@"
