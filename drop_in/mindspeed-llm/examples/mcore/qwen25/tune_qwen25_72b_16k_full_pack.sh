#!/bin/bash
# Qwen2.5 72B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen25_72b_16k_full_pack}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-72b-hf/}"
: "${NNODES:=8}" "${TP:=8}" "${PP:=8}"
: "${NUM_LAYER_LIST=8,9,10,10,11,11,11,10}"
: "${SEQ_LEN:=16384}" "${MBS:=1}" "${GBS:=128}" "${TRAIN_ITERS:=2000}"
: "${LR:=7.75e-7}" "${MIN_LR:=7.75e-8}" "${WEIGHT_DECAY:=0.0}" "${PROMPT_TYPE:=qwen}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --use-distributed-optimizer --overlap-param-gather --recompute-granularity full \
    --recompute-method block --recompute-num-layers 1 --seed 1234 --reset-attention-mask --neat-pack \
    --padded-samples "$@"
