#!/bin/bash
# Qwen2.5 72B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen25_72b_4k_full_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-72b-hf/}"
: "${NNODES:=4}" "${TP:=8}" "${PP:=2}"
: "${SEQ_LEN:=4096}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
: "${WEIGHT_DECAY:=0.0}" "${PROMPT_TYPE:=qwen}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --use-distributed-optimizer --overlap-param-gather --seed 1234 --padded-samples \
    --no-pad-to-seq-lengths --recompute-granularity full --recompute-method block --recompute-num-layers 4 \
    --recompute-activation-function "$@"
