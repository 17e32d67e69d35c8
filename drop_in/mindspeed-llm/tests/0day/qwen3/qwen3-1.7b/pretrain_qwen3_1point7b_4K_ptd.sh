#!/bin/bash
# Pretraining of Qwen3-1.7B from CKPT_LOAD_DIR; empty, as in the guide: from random weights.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd)"
source "$ROOT/../lib.sh"

: "${CKPT_LOAD_DIR=}"
: "${CKPT_SAVE_DIR:=./ckpt}"
: "${DATA_PATH:=../dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=../qwen3-1point7b-base}"
: "${TP:=8}"
: "${PP:=1}"
: "${SEQ_LENGTH:=4096}"
: "${TRAIN_ITERS:=2000}"
: "${MBS:=1}"
: "${GBS:=64}"

PARALLEL_ARGS=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --use-distributed-optimizer)
[ "$TP" -gt 1 ] && PARALLEL_ARGS+=(--sequence-parallel)

TRAIN_ARGS=(
    --seq-length "$SEQ_LENGTH"
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
    --seed 42
    --bf16
)

# shellcheck disable=SC2086  # a blend is several words
DATA_ARGS=(--data-path $DATA_PATH --split 100,0,0 --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH")

OUTPUT_ARGS=(--log-interval 1 --save-interval "$TRAIN_ITERS" --eval-interval "$TRAIN_ITERS" --eval-iters 0)

device_environment
logged train_mcore_qwen3_1point7b processes pretrain_gpt.py \
    "${PARALLEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" \
    --load "$CKPT_LOAD_DIR" --no-load-optim --no-load-rng --save "$CKPT_SAVE_DIR" --no-shared-storage \
    --distributed-backend nccl "$@"
made "$CKPT_SAVE_DIR"
