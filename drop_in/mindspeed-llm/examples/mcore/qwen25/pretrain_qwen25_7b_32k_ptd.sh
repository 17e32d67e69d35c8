#!/bin/bash
# Pretraining of Qwen2.5-7B from CKPT_LOAD_DIR, a checkpoint of any format and cut; empty: from random weights.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
source "$ROOT/../lib.sh"

: "${CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/}"
: "${CKPT_SAVE_DIR:=./ckpt/qwen25-7b}"
: "${DATA_PATH:=./dataset/alpaca_text_document}"
: "${TOKENIZER_PATH:=./model_from_hf/qwen2.5-7b-hf/}"
: "${TP:=1}"
: "${PP:=4}"
: "${SEQ_LEN:=4096}"
: "${MBS:=1}"
: "${GBS:=64}"
: "${TRAIN_ITERS:=2000}"

PARALLEL_ARGS=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP")
[ "$TP" -gt 1 ] && PARALLEL_ARGS+=(--sequence-parallel)

TRAIN_ARGS=(
    --seq-length "$SEQ_LEN"
    --micro-batch-size "$MBS"
    --global-batch-size "$GBS"
    --train-iters "$TRAIN_ITERS"
    --lr 1.25e-6
    --lr-decay-style cosine
    --min-lr 1.25e-7
    --lr-warmup-fraction 0.01
    --init-method-std 0.01
    --weight-decay 1e-1
    --clip-grad 1.0
    --adam-beta1 0.9
    --adam-beta2 0.95
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --seed 1234
    --bf16
)

# shellcheck disable=SC2086  # a blend is several words
DATA_ARGS=(--data-path $DATA_PATH --split 100,0,0 --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH")

CKPT_ARGS=(--load "$CKPT_LOAD_DIR" --no-load-optim --no-load-rng --save "$CKPT_SAVE_DIR")

OUTPUT_ARGS=(--log-interval 1 --save-interval 2000 --eval-interval 2000 --eval-iters 0 --log-throughput)

device_environment
logged pretrain_mcore_qwen25_7b_32k processes pretrain_gpt.py \
    "${PARALLEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${DATA_ARGS[@]}" "${CKPT_ARGS[@]}" "${OUTPUT_ARGS[@]}" \
    --distributed-backend nccl "$@"
made "$CKPT_SAVE_DIR"
