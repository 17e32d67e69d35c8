#!/bin/bash
# Llama 2 70B: adapters beside a frozen model, on dialogues.
: "${CKPT_LOAD_DIR=${CHECKPOINT-./model_weights/llama2-legacy/}}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_llama2_70b_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-70b-hf/}}"
: "${NNODES:=2}" "${TP:=8}" "${PP:=2}"
: "${SEQ_LEN:=4096}" "${MBS:=2}" "${GBS:=1024}" "${TRAIN_ITERS:=5000}"
: "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=1000}" "${LR:=1.0e-6}" "${MIN_LR:=1.0e-7}"
: "${WEIGHT_DECAY:=1e-2}" "${ADAM_BETA2:=0.999}" "${PROMPT_TYPE:=llama2}" "${LORA_R:=16}"
: "${LORA_ALPHA:=32}"
TRAINER=pretrain_gpt.py
source "$(dirname "${BASH_SOURCE[0]}")/../../../examples.sh"
tune "$@"
