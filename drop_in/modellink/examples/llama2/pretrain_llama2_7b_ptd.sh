#!/bin/bash
# Pretraining of Llama2-7B from CKPT_LOAD_DIR, a checkpoint of any format and cut; empty: from random weights.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$ROOT/../lib.sh"

: "${CKPT_LOAD_DIR=${CHECKPOINT-./model_weights/llama2-legacy/}}"
: "${CKPT_SAVE_DIR:=./ckpt}"
: "${DATA_PATH:=./dataset/enwiki_text_document}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-hf/}}"
: "${TP:=1}"
: "${PP:=2}"
: "${SEQ_LEN:=4096}"
: "${MBS:=1}"
: "${GBS:=256}"
: "${TRAIN_ITERS:=5000}"
: "${SPLIT:=949,50,1}"
: "${EVAL_ITERS:=10}"

PARALLEL_ARGS=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --use-distributed-optimizer)
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
    --bf16
)

# shellcheck disable=SC2086  # a blend is several words
DATA_ARGS=(--data-path $DATA_PATH --split "$SPLIT" --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_PATH")

OUTPUT_ARGS=(--log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters "$EVAL_ITERS")

device_environment
logged "${LOG_NAME:-train_llama2_7b}" processes pretrain_gpt.py \
    "${PARALLEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" \
    --load "$CKPT_LOAD_DIR" --no-load-optim --no-load-rng --save "$CKPT_SAVE_DIR" --distributed-backend nccl "$@"
made "$CKPT_SAVE_DIR"
