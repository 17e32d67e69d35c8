#!/bin/bash
# Qwen2.5 0.5B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen25_0point5b_4k_full_pack}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-0.5b-hf/}"
: "${TP:=1}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=8}" "${TRAIN_ITERS:=2000}"
: "${LR:=7.75e-7}" "${MIN_LR:=7.75e-8}" "${PROMPT_TYPE:=qwen}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --use-distributed-optimizer --seed 42 --reset-attention-mask --neat-pack --padded-samples "$@"
