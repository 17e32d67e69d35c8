#!/bin/bash
# Llama 2 7B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/llama2-mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_llama2_7b_full_pack_16k}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-2-7b-hf/}"
: "${TP:=1}" "${PP:=2}" "${CP:=2}"
: "${SEQ_LEN:=16384}" "${MBS:=1}" "${GBS:=128}" "${TRAIN_ITERS:=2000}"
: "${LR:=1.0e-6}" "${MIN_LR:=0}" "${ADAM_BETA2:=0.999}" "${PROMPT_TYPE:=llama2}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --no-check-for-nan-in-loss-and-grad --context-parallel-algo megatron_cp_algo --swap-attention \
    --num-workers 16 --overlap-param-gather --use-distributed-optimizer --adam-eps 1e-5 \
    --reset-attention-mask "$@"
