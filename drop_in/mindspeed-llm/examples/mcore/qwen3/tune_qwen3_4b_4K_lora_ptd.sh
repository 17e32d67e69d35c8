#!/bin/bash
# Qwen3 4B: adapters beside a frozen model, on dialogues.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen3_4b_4K_lora_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-4b-hf/}"
: "${TP:=1}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=16}" "${TRAIN_ITERS:=2000}"
: "${LR:=1.25e-5}" "${MIN_LR:=1.25e-7}" "${PROMPT_TYPE:=qwen3}" "${LORA_R:=16}" "${LORA_ALPHA:=32}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --use-distributed-optimizer --seed 42 --no-pad-to-seq-lengths "$@"
