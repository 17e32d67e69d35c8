#!/bin/bash
# Texts of Llama2-7B with the adapter in CHECKPOINT_LORA, which is not merged.
export LOG_NAME="${LOG_NAME:-generate_llama2_7b_lora}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/generate_llama2_7b_ptd.sh" --lora-load "${CHECKPOINT_LORA:-./ckpt}" "$@"
