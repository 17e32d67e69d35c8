# Sourced by the scripts of the suites: what they share. None of them says how large a model is: config.json does.
#
#   program FILE ARGUMENT...      one of the suite's programs, in one process
#   processes FILE ARGUMENT...    the same in NPUS_PER_NODE processes of each node
#   logged NAME COMMAND...        a command whose output also goes to logs/NAME.log
#   made PATH                     says where the result is
#
# shellcheck shell=bash

# Not -u: before bash 4.4 an empty array counts as unset.
set -eo pipefail

: "${PYTHON:=python}"
: "${MASTER_ADDR:=localhost}"
: "${MASTER_PORT:=6000}"
: "${NNODES:=1}"
: "${NODE_RANK:=0}"
: "${NPUS_PER_NODE:=${GPUS_PER_NODE:-8}}"
: "${ASCEND_ROOT:=/usr/local/Ascend}"
export -n NPUS_PER_NODE GPUS_PER_NODE NNODES NODE_RANK  # said by flags, and only by them

say() { echo "drop-in: $*" >&2; }

# Ascend's environment, from the first of each pair of places that exists.
device_environment() {
    local first second found=no
    while read -r first second; do
        if [ -f "$first" ]; then
            found=yes
            source "$first" || true
        elif [ -f "$second" ]; then
            found=yes
            source "$second" || true
        fi
    done <<PLACES
$ASCEND_ROOT/cann/set_env.sh $ASCEND_ROOT/ascend-toolkit/set_env.sh
$ASCEND_ROOT/nnal/atb/set_env.sh $ASCEND_ROOT/nnal/atb/set_env.sh
PLACES
    [ "$found" = yes ] || say "no set_env.sh under $ASCEND_ROOT: this is no Ascend machine, or CANN is elsewhere (ASCEND_ROOT)"
}

case "$MASTER_ADDR" in
    locahost) say "MASTER_ADDR is locahost: localhost is meant" && MASTER_ADDR=localhost ;;
esac

program() { "$PYTHON" "$ROOT/$1" "${@:2}"; }

processes() {
    program "$1" --nproc-per-node "$NPUS_PER_NODE" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "${@:2}"
}

logged() {
    mkdir -p logs
    "${@:2}" 2>&1 | tee "logs/$1.log"
}

made() { echo "drop-in: $1"; }
