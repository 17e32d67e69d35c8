#!/bin/bash
# MindSpore's script of this name. Files are the same for both frameworks, so that the one of examples/mcore does it.
echo "drop-in: by PyTorch, on the CPU; MindSpore trains on the same files" >&2
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../mcore/qwen25/ckpt_convert_qwen25_hf2mcore.sh" "$@"
