#!/bin/bash
# Llama 2 7B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/llama2-mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_llama2_7b_full_pad}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-7b-hf/}"
: "${TP:=8}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=4}" "${GBS:=128}" "${TRAIN_ITERS:=2000}"
: "${LR:=5e-5}" "${MIN_LR:=1.25e-7}" "${PROMPT_TYPE:=llama2}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune "$@"
