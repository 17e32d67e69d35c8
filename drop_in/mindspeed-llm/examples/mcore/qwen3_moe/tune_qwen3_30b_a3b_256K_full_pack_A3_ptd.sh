#!/bin/bash
# Qwen3 30B-A3B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen3_30b_a3b_256K_full_pack_A3_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-30b-a3b-hf/}"
: "${NPUS_PER_NODE:=16}" "${NNODES:=8}" "${TP:=2}" "${PP:=2}" "${CP:=16}" "${EP:=16}"
: "${SEQ_LEN:=262144}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
: "${LR:=1.25e-5}" "${MIN_LR:=1.25e-7}" "${PROMPT_TYPE:=qwen3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --handler-name AlpacaStyleInstructionHandler --enable-thinking true --pack --neat-pack \
    --expert-tensor-parallel-size 1 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001 \
    --use-distributed-optimizer --overlap-param-gather --recompute-activation-function \
    --reset-attention-mask --seed 42 --manual-gc --manual-gc-interval 50 \
    --context-parallel-algo ulysses_cp_algo "$@"
