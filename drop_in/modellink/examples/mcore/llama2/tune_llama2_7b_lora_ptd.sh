#!/bin/bash
# Llama 2 7B: adapters beside a frozen model, on dialogues.
: "${CKPT_LOAD_DIR=${CHECKPOINT-./model_weights/llama2-mcore/}}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_llama2_7b_lora_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-hf/}}"
: "${TP:=1}" "${PP:=1}"
: "${SEQ_LEN:=2048}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
: "${LR:=5.0e-5}" "${MIN_LR:=1.25e-6}" "${ADAM_BETA2:=0.999}" "${PROMPT_TYPE:=llama2}" "${LORA_R:=8}" "${LORA_ALPHA:=16}"
TRAINER=pretrain_gpt.py
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --variable-seq-lengths "$@"
