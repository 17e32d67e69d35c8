#!/bin/bash
# A command in a container that sees this machine's accelerators, and this folder as /workspace. Without a command: a shell.
#   docker/run.sh tessel selftest
#   IMAGE=my-image SHM_SIZE=500g MOUNTS=/data:/models docker/run.sh bash train.sh
# IMAGE: tessel-ascend where there are Ascend NPUs, else tessel. MOUNTS: further folders, which keep their paths.
# It is never --privileged: the container gets the devices alone.
set -euo pipefail

: "${SHM_SIZE:=64g}"
: "${MOUNTS:=}"
: "${HOST:=}"  # where the machine's / is: for tests

arguments=(run --rm --net=host "--shm-size=$SHM_SIZE" -v "$PWD:/workspace" -w /workspace)
[ -t 0 ] && [ -t 1 ] && arguments+=(-it)

found() { [ -e "$HOST$1" ]; }

ascend() {
    local path name
    for path in "$HOST"/dev/davinci[0-9]*; do
        arguments+=("--device=${path#"$HOST"}")
    done
    for name in davinci_manager hisi_hdc devmm_svm; do
        if found "/dev/$name"; then
            arguments+=("--device=/dev/$name")
        else
            echo "run.sh: /dev/$name is missing: is Huawei's driver loaded?" >&2
        fi
    done
    for path in /usr/local/Ascend/driver /usr/local/sbin /usr/local/bin/npu-smi /usr/local/dcmi /etc/ascend_install.info; do
        if found "$path"; then arguments+=(-v "$path:$path:ro"); fi
    done
    image=tessel-ascend
}

image=tessel
if compgen -G "$HOST/dev/davinci[0-9]*" > /dev/null; then
    ascend
elif compgen -G "$HOST/dev/nvidia[0-9]*" > /dev/null; then
    arguments+=(--gpus all)
else
    echo "run.sh: no accelerator under /dev: on the CPU" >&2
fi

if [ -n "$MOUNTS" ]; then  # before bash 4.4 an empty array counts as unset
    IFS=: read -r -a folders <<< "$MOUNTS"
    for folder in "${folders[@]}"; do
        arguments+=(-v "$folder:$folder")
    done
fi

[ $# -gt 0 ] || set -- bash
exec docker "${arguments[@]}" "${IMAGE:-$image}" "$@"
