#!/bin/bash
# Adapters beside a frozen Llama2-7B, on instructions.
export LOG_NAME="${LOG_NAME:-tune_llama2_7b_lora}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/tune_llama2_7b_ptd.sh" \
    --lora-r "${LORA_R:-16}" --lora-alpha "${LORA_ALPHA:-32}" \
    --lora-target-modules query_key_value dense dense_h_to_4h dense_4h_to_h "$@"
