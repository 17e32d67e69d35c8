#!/bin/bash
# Qwen2.5 7B: adapters beside a frozen model, on dialogues.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen25_7b_lora_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-7b-hf/}"
: "${TP:=1}" "${PP:=8}"
: "${NUM_LAYER_LIST=4,4,4,4,3,3,3,3}"
: "${SEQ_LEN:=32768}" "${MBS:=1}" "${GBS:=8}" "${TRAIN_ITERS:=2000}"
: "${WEIGHT_DECAY:=0.0}" "${PROMPT_TYPE:=qwen}" "${LORA_R:=8}" "${LORA_ALPHA:=16}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --seed 1234 --no-pad-to-seq-lengths "$@"
