#!/bin/bash
# Qwen2.5 72B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen25_72b_32k_full_pack}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-72b-hf/}"
: "${NPUS_PER_NODE:=16}" "${NNODES:=4}" "${TP:=8}" "${PP:=2}" "${CP:=4}"
: "${SEQ_LEN:=32768}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
: "${LR:=7.75e-7}" "${MIN_LR:=7.75e-8}" "${WEIGHT_DECAY:=0.0}" "${PROMPT_TYPE:=qwen}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    --context-parallel-algo ulysses_cp_algo --use-distributed-optimizer --overlap-param-gather --seed 1234 \
    --reset-attention-mask --neat-pack --padded-samples "$@"
