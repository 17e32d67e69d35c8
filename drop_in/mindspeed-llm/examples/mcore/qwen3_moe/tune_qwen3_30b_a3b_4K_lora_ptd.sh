#!/bin/bash
# Qwen3 30B-A3B: adapters beside a frozen model, on dialogues.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen3_30b_a3b_4K_lora_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-30b-a3b-hf/}"
: "${TP:=4}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=8}" "${GBS:=64}" "${TRAIN_ITERS:=2000}"
: "${LR:=1.25e-5}" "${MIN_LR:=1.25e-7}" "${PROMPT_TYPE:=qwen3}" "${LORA_R:=16}" "${LORA_ALPHA:=32}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --no-pad-to-seq-lengths --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001 \
    --use-distributed-optimizer --seed 42 "$@"
