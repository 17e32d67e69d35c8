#!/bin/bash
# Fine-tuning of Llama2-7B on instructions, whole; tune_llama2_7b_lora_ptd.sh trains adapters.
export DATA_PATH="${DATA_PATH:-./finetune_dataset/alpaca}" LOG_NAME="${LOG_NAME:-tune_llama2_7b}"
export TP="${TP:-8}" PP="${PP:-1}" MBS="${MBS:-4}" GBS="${GBS:-128}" TRAIN_ITERS="${TRAIN_ITERS:-2000}"
export SPLIT="${SPLIT:-100,0,0}" EVAL_ITERS="${EVAL_ITERS:-0}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain_llama2_7b_ptd.sh" \
    --finetune --stage sft --is-instruction-dataset --variable-seq-lengths --tokenizer-not-use-fast \
    --prompt-type "${PROMPT_TYPE:-llama2}" "$@"
