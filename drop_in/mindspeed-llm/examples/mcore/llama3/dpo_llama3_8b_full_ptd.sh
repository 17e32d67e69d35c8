#!/bin/bash
# Llama 3 8B: preferences (DPO).
: "${CKPT_LOAD_DIR=./model_weights/llama3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/dpo_llama3_8b_full_ptd}"
: "${DATA_PATH:=./pairwise_dataset/orca_rlhf}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-8b-hf/}"
: "${TP:=1}" "${PP:=8}"
: "${SEQ_LEN:=2048}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=200}"
: "${LR:=5e-8}" "${MIN_LR:=0.0}" "${PROMPT_TYPE:=llama3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
prefer --no-pad-to-seq-lengths --deterministic-mode --lr-decay-style constant --weight-decay 0.0 \
    --lr-warmup-fraction 0.0 --adam-beta2 0.999 "$@"
