#!/bin/bash
# A dialogue with Llama2-7B in its template.
export LOG_NAME="${LOG_NAME:-chat_llama2_7b}" NPUS_PER_NODE="${NPUS_PER_NODE:-1}" TP="${TP:-1}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/generate_llama2_7b_ptd.sh" \
    --task chat --prompt-type "${PROMPT_TYPE:-llama2}" "$@"
