"""What devices can do at best, from their makers' data sheets."""

from __future__ import annotations

# Dense 16-bit (fp16 and bf16 are alike) FLOP/s by a part of the device's name, the more special first.
# NVIDIA: data sheets, without sparsity. Ascend: Huawei's figures for the 910B family.
FLOPS_16BIT = {
    "B300": 2.25e15,
    "B200": 2.25e15,
    "GH200": 989.5e12,
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "H800": 989.5e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A30": 165e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
    "Ascend910B1": 414e12,
    "Ascend910B2": 376e12,
    "Ascend910B3": 313e12,
    "Ascend910B4": 280e12,
}
# fp32 without TF32, of the devices whose fp32 runs are likely.
FLOPS_32BIT = {
    "GH200": 66.9e12,
    "H200": 66.9e12,
    "H100 PCIe": 51.2e12,
    "H100": 66.9e12,
    "H800": 66.9e12,
    "A100": 19.5e12,
    "A800": 19.5e12,
    "RTX 4090": 82.6e12,
    "V100": 15.7e12,
    "T4": 8.1e12,
}
