#!/bin/bash
# Qwen3 30B-A3B: fine-tuning on dialogues, whole.
: "${CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/tune_qwen3_30b_a3b_32K_full_pack_A3_ptd}"
: "${DATA_PATH:=./finetune_dataset/alpaca}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen3-30b-a3b-hf/}"
: "${NPUS_PER_NODE:=16}" "${NNODES:=2}" "${TP:=4}" "${PP:=2}" "${EP:=8}"
: "${SEQ_LEN:=32768}" "${MBS:=1}" "${GBS:=32}" "${TRAIN_ITERS:=2000}"
: "${LR:=1.25e-5}" "${MIN_LR:=1.25e-7}" "${PROMPT_TYPE:=qwen3}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../../examples.sh"
tune --neat-pack --pack --handler-name AlpacaStyleInstructionHandler --expert-tensor-parallel-size 1 \
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001 --use-distributed-optimizer \
    --swap-optimizer --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    --reset-attention-mask --seed 42 --manual-gc --manual-gc-interval 50 \
    --context-parallel-algo ulysses_cp_algo "$@"
