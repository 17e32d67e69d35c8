#!/bin/bash
# Qwen3 32B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen3_32b_32K_full_pack_A3_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-32b-hf/}"
: "${NPUS_PER_NODE:=16}" "${NNODES:=2}" "${TP:=4}" "${PP:=2}" "${CP:=2}"
: "${VPP=16}"
: "${SEQ_LEN:=32768}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
: "${PROMPT_TYPE:=qwen3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --handler-name AlpacaStyleInstructionHandler --enable-thinking true --pack --neat-pack \
    --use-distributed-optimizer --recompute-granularity full --recompute-method uniform \
    --recompute-num-layers 1 --use-ascend-mc2 --seed 42 --reset-attention-mask \
    --context-parallel-algo ulysses_cp_algo "$@"
