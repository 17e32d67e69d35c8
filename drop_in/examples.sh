# Sourced by the example scripts of MindSpeed-LLM and ModelLink: what a kind of script does. A script sets its variables,
# each of which may be set in the environment, and calls one of these; ARGUMENTs come last and count.
#
#   texts ARGUMENT...                    INPUT -> OUTPUT_PREFIX_text_document.bin and .idx, by the tokenizer of TOKENIZER_PATH
#   dialogues ARGUMENT...                INPUT -> OUTPUT_PREFIX_packed_*_document.bin and .idx
#   to_megatron PROGRAM ARGUMENT...      LOAD_DIR -> SAVE_DIR in Megatron's torch format, cut for TP x PP (x EP)
#   to_legacy PROGRAM ARGUMENT...        the same in the format of Megatron before its core
#   to_hugging_face PROGRAM ARGUMENT...  LOAD_DIR, cut anyhow -> mg2hf/ or mg2hg/ in SAVE_DIR, the original model
#   pretrain ARGUMENT...                 from CKPT_LOAD_DIR, a checkpoint of any format and cut; empty: from random weights
#   tune ARGUMENT...                     the same on dialogues in the template PROMPT_TYPE; with LORA_R adapters alone
#   prefer ARGUMENT...                   the same on pairs of a chosen and a rejected answer
#   generate ARGUMENT...                 the suite's demonstrations with CHECKPOINT, or --task and --prompt
#   chat ARGUMENT...                     a dialogue in the template PROMPT_TYPE
#   evaluate ARGUMENT...                 TASK on the questions in DATA_PATH; --rule choice judges by likelihood
#
# shellcheck shell=bash disable=SC2153,SC2154

ROOT="$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)"
case "$ROOT" in
    */tests/0day/*) ROOT="${ROOT%/tests/0day/*}" ;;
    *) ROOT="${ROOT%/examples/*}" ;;
esac
: "${LOG_NAME:=$(basename "${BASH_SOURCE[1]}" .sh)}"
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
device_environment

_preprocess() {
    mkdir -p "$(dirname "$OUTPUT_PREFIX")"
    program preprocess_data.py \
        --input "$INPUT" \
        --tokenizer-type PretrainedFromHF \
        --tokenizer-name-or-path "$TOKENIZER_PATH" \
        --output-prefix "$OUTPUT_PREFIX" \
        --workers "${WORKERS:-4}" \
        --log-interval 1000 "$@"
}

texts() { _preprocess "$@" && made "${OUTPUT_PREFIX}_text_document"; }

dialogues() { _preprocess "$@" && made "$OUTPUT_PREFIX"; }

_convert() { program "$1" --load-dir "$LOAD_DIR" --save-dir "$SAVE_DIR" "${@:2}"; }

# How layers are dealt out to pipeline stages, where a script says so; with another PP, set these, or nothing: VPP=
_stages() {
    stages=()
    if [ -n "${NUM_LAYER_LIST:-}" ]; then stages+=(--num-layer-list "$NUM_LAYER_LIST"); fi
    if [ -n "${VPP:-}" ]; then stages+=(--num-layers-per-virtual-pipeline-stage "$VPP"); fi
    if [ -n "${NOOP_LAYERS:-}" ]; then stages+=(--noop-layers "$NOOP_LAYERS"); fi
}

to_megatron() {
    local stages
    _stages
    local cut=(--target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" "${stages[@]}")
    if [ "${EP:-1}" -gt 1 ]; then cut+=(--target-expert-parallel-size "$EP"); fi
    [[ "$1" = *_v2.py ]] || cut+=(--use-mcore-models --model-type GPT --params-dtype "${PARAMS_DTYPE:-bf16}")
    _convert "$1" --load-model-type hf --save-model-type mg "${cut[@]}" "${@:2}"
    made "$SAVE_DIR"
}

to_legacy() {
    _convert "$1" --model-type GPT --loader llama2_hf --saver megatron \
        --target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" "${@:2}"
    made "$SAVE_DIR"
}

to_hugging_face() {
    local flags=()
    [[ "$1" = *_v2.py ]] || flags=(--use-mcore-models --model-type GPT)
    if [ -n "${CHECKPOINT_LORA:-}" ]; then flags+=(--lora-load "$CHECKPOINT_LORA"); fi
    _convert "$1" --load-model-type mg --save-model-type hf "${flags[@]}" "${@:2}"
    case "$1:$ROOT" in
        *_v2.py:*) made "$SAVE_DIR" ;;
        *:*/modellink) made "${SAVE_DIR%/}/mg2hg" ;;
        *) made "${SAVE_DIR%/}/mg2hf" ;;
    esac
}

_layout() {
    layout=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP")
    if [ "${EP:-1}" -gt 1 ]; then layout+=(--expert-model-parallel-size "$EP"); fi
}

_train() {
    local layout stages data
    _layout
    _stages
    if [ "$TP" -gt 1 ]; then layout+=(--sequence-parallel); fi
    if [ "${CP:-1}" -gt 1 ]; then layout+=(--context-parallel-size "$CP"); fi
    read -ra data <<< "$DATA_PATH"  # a blend is several words
    logged "$LOG_NAME" processes "$1" "${layout[@]}" "${stages[@]}" \
        --seq-length "${SEQ_LENGTH:-$SEQ_LEN}" \
        --micro-batch-size "$MBS" \
        --global-batch-size "$GBS" \
        --train-iters "$TRAIN_ITERS" \
        --lr "${LR:-1.25e-6}" \
        --lr-decay-style "${LR_DECAY_STYLE:-cosine}" \
        --min-lr "${MIN_LR:-1.25e-7}" \
        --lr-warmup-fraction "${LR_WARMUP_FRACTION:-0.01}" \
        --init-method-std 0.01 \
        --weight-decay "${WEIGHT_DECAY:-1e-1}" \
        --clip-grad 1.0 \
        --adam-beta1 0.9 \
        --adam-beta2 "${ADAM_BETA2:-0.95}" \
        --attention-dropout 0.0 \
        --hidden-dropout 0.0 \
        --bf16 \
        --data-path "${data[@]}" \
        --split "${SPLIT:-100,0,0}" \
        --tokenizer-type PretrainedFromHF \
        --tokenizer-name-or-path "$TOKENIZER_PATH" \
        --load "$CKPT_LOAD_DIR" \
        --no-load-optim \
        --no-load-rng \
        --save "$CKPT_SAVE_DIR" \
        --save-interval "${SAVE_INTERVAL:-$TRAIN_ITERS}" \
        --log-interval 1 \
        --log-throughput \
        --eval-interval "${EVAL_INTERVAL:-$TRAIN_ITERS}" \
        --eval-iters "${EVAL_ITERS:-0}" \
        --distributed-backend nccl "${@:2}"
    made "$CKPT_SAVE_DIR"
}

_adapters() {
    adapters=()
    if [ -n "${LORA_R:-}" ]; then
        adapters=(--lora-r "$LORA_R" --lora-alpha "$LORA_ALPHA")
        adapters+=(--lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2)
    fi
}

pretrain() { _train pretrain_gpt.py "$@"; }

tune() {
    local adapters
    _adapters
    _train "${TRAINER:-posttrain_gpt.py}" --finetune --stage sft --is-instruction-dataset --prompt-type "$PROMPT_TYPE" \
        "${adapters[@]}" "$@"
}

prefer() {
    local adapters
    _adapters
    _train "${TRAINER:-posttrain_gpt.py}" --finetune --stage dpo --is-pairwise-dataset --dpo-loss-type sigmoid \
        "${adapters[@]}" "$@"
}

# inference.py and evaluation.py: precision is that of the checkpoint.
_use() {
    local layout
    _layout
    if [ -n "${CHECKPOINT_LORA:-}" ]; then layout+=(--lora-load "$CHECKPOINT_LORA"); fi
    logged "$LOG_NAME" processes "$1" "${layout[@]}" \
        --max-new-tokens "$MAX_NEW_TOKENS" \
        --tokenizer-type PretrainedFromHF \
        --tokenizer-name-or-path "$TOKENIZER_PATH" \
        --seed 42 \
        --load "$CHECKPOINT" "${@:2}"
    made "logs/$LOG_NAME.log"
}

generate() { _use inference.py "$@"; }

chat() { _use inference.py --task chat --prompt-type "$PROMPT_TYPE" "$@"; }

evaluate() {
    LOG_NAME="${LOG_NAME}_$TASK"
    _use evaluation.py --task "$TASK" --task-data-path "$DATA_PATH" "$@"
}
