#!/bin/bash
# Llama 2 70B: adapters beside a frozen model in NF4.
: "${CKPT_LOAD_DIR=./model_weights/llama2-mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_llama2_70b_qlora_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-70b-hf/}"
: "${NPUS_PER_NODE:=2}" "${TP:=2}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=1}" "${TRAIN_ITERS:=2000}"
: "${LR:=1.0e-6}" "${MIN_LR:=0}" "${LR_WARMUP_FRACTION:=0.00}" "${WEIGHT_DECAY:=0.0}"
: "${ADAM_BETA2:=0.999}" "${PROMPT_TYPE:=llama2}" "${LORA_R:=16}" "${LORA_ALPHA:=32}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --adam-eps 1e-8 --no-pad-to-seq-lengths --seed 42 --qlora "$@"
