#!/bin/bash
# Llama 3 8B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/llama3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_llama3_8b_full_pack}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/llama-3-8b-hf/}"
: "${NPUS_PER_NODE:=4}" "${TP:=4}" "${PP:=1}"
: "${SEQ_LEN:=8192}" "${MBS:=1}" "${GBS:=64}" "${TRAIN_ITERS:=2000}"
: "${EVAL_ITERS:=10}" "${EVAL_INTERVAL:=2000}" "${LR:=1e-7}" "${MIN_LR:=0}"
: "${LR_DECAY_STYLE:=constant}" "${WEIGHT_DECAY:=0.0}" "${ADAM_BETA2:=0.999}"
: "${PROMPT_TYPE:=llama3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --reset-attention-mask --seed 42 "$@"
