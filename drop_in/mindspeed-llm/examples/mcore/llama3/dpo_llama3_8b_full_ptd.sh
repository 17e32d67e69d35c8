#!/bin/bash
# Llama 3 8B: preferences (DPO).
: "${CKPT_LOAD_DIR=./model_weights/llama3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/dpo_llama3_8b_full_ptd}"
: "${DATA_PATH:=./pairwise_dataset/orca_rlhf}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-8b-hf/}"
: "${TP:=1}" "${PP:=8}"
: "${SEQ_LEN:=2048}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=200}"
: "${LR:=5e-8}" "${MIN_LR:=0.0}" "${LR_DECAY_STYLE:=constant}" "${LR_WARMUP_FRACTION:=0.0}"
: "${WEIGHT_DECAY:=0.0}" "${ADAM_BETA2:=0.999}" "${PROMPT_TYPE:=llama3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
prefer --no-pad-to-seq-lengths --deterministic-mode "$@"
