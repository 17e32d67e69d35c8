#!/bin/bash
# Llama 2 7B: adapters beside a frozen model, on dialogues.
: "${CKPT_LOAD_DIR=./model_weights/llama2-mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_llama2_7b_lora_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-7b-hf/}"
: "${TP:=8}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=4}" "${GBS:=128}" "${TRAIN_ITERS:=1000}"
: "${SPLIT:=949,50,1}" "${LR:=5e-5}" "${MIN_LR:=1.25e-6}" "${ADAM_BETA2:=0.98}"
: "${PROMPT_TYPE:=llama2}" "${LORA_R:=16}" "${LORA_ALPHA:=32}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --no-pad-to-seq-lengths "$@"
