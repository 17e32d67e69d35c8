#!/bin/bash
# Qwen2.5 0.5B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen25_0point5b_4k_full_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-0.5b-hf/}"
: "${NPUS_PER_NODE:=1}" "${TP:=1}" "${PP:=1}"
: "${SEQ_LEN:=4096}" "${MBS:=8}" "${GBS:=8}" "${TRAIN_ITERS:=2000}"
: "${LR:=1e-6}" "${MIN_LR:=0}" "${WEIGHT_DECAY:=0.0}" "${PROMPT_TYPE:=qwen}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --no-pad-to-seq-lengths --seed 42 "$@"
