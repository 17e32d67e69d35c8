#!/bin/bash
# Llama 2: dialogues for fine-tuning.
: "${INPUT:=./dataset/sharegpt_formatted_data-evol-gpt4.jsonl}"
: "${TOKENIZER_PATH:=${TOKENIZER_MODEL:-./model_from_hf/llama2-hf/}}"
: "${OUTPUT_PREFIX:=./finetune_dataset/sharegpt}"
source "$(dirname "${BASH_SOURCE[0]}")/../../../examples.sh"
dialogues --handler-name SharegptStyleInstructionHandler --prompt-type llama2 "$@"
