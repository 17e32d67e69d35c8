#!/bin/bash
# Llama 3 8B: adapters beside a frozen model, on dialogues.
: "${CKPT_LOAD_DIR=./model_weights/llama3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_llama3_8b_lora_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-8b-hf/}"
: "${TP:=1}" "${PP:=8}"
: "${SEQ_LEN:=8192}" "${MBS:=1}" "${GBS:=8}" "${TRAIN_ITERS:=2000}"
: "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=2000}" "${LR:=1e-6}" "${MIN_LR:=0}" "${WEIGHT_DECAY:=0.0}"
: "${ADAM_BETA2:=0.999}" "${PROMPT_TYPE:=llama3}" "${LORA_R:=8}" "${LORA_ALPHA:=16}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --no-pad-to-seq-lengths --seed 42 "$@"
