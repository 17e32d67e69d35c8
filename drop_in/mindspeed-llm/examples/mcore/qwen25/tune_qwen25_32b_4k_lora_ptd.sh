#!/bin/bash
# Qwen2.5 32B: adapters beside a frozen model, on dialogues.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen25_32b_4k_lora_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-32b-hf/}"
: "${TP:=4}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=16}" "${TRAIN_ITERS:=2000}"
: "${WEIGHT_DECAY:=0.0}" "${PROMPT_TYPE:=qwen}" "${LORA_R:=8}" "${LORA_ALPHA:=16}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --use-distributed-optimizer --seed 1234 --padded-samples --no-pad-to-seq-lengths "$@"
