# tessel on Ascend NPUs (Atlas A2 and A3). The host needs Huawei's driver and firmware, nothing else; see docs/ASCEND.md.
# Huawei's images hold toolkit, kernels and nnal of one CANN version for one chip: 910b is Atlas A2, a3 is Atlas A3.
ARG CANN_IMAGE=quay.io/ascend/cann:8.5.0-910b-ubuntu22.04-py3.11
FROM ${CANN_IMAGE}

# torch_npu has the version of its torch.
ARG TORCH=2.11.0
WORKDIR /opt/tessel
COPY . .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    "torch==${TORCH}" "torch-npu==${TORCH}" .

# Huawei's scripts put CANN and nnal into the environment of every shell.
# hadolint ignore=SC2016
RUN printf '%s\n' '#!/bin/bash' \
    'cann=/usr/local/Ascend/cann; [ -d $cann ] || cann=/usr/local/Ascend/ascend-toolkit' \
    'for script in $cann/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do' \
    '  [ -f "$script" ] && source "$script"' \
    'done' \
    'exec "$@"' > /usr/local/bin/with-cann && chmod +x /usr/local/bin/with-cann

WORKDIR /workspace
ENTRYPOINT ["with-cann"]
CMD ["tessel", "doctor"]
