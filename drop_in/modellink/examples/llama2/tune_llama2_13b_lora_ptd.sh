#!/bin/bash
# Llama 2 13B: adapters beside a frozen model, on dialogues.
: "${CKPT_LOAD_DIR=${CHECKPOINT-./model_weights/llama2-legacy/}}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_llama2_13b_lora_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-13b-hf/}}"
: "${TP:=1}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=4}" "${GBS:=128}" "${TRAIN_ITERS:=1000}"
: "${LR:=5.0e-5}" "${MIN_LR:=1e-6}" "${PROMPT_TYPE:=llama2}" "${LORA_R:=8}" "${LORA_ALPHA:=16}"
TRAINER=pretrain_gpt.py
source "$(dirname "${BASH_SOURCE[0]}")/../../../examples.sh"
tune --variable-seq-lengths "$@"
