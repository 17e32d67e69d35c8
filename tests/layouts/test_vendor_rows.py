"""Whole runs through the vendor's rows, MC2 among them, with operators of the documented meaning on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from tests.layouts.conftest import Reference
from tests.layouts.harness import compare, forget, read, train
from tests.layouts.layouts import Case, arguments, marked
from tests.model import vendor_operators

_TP2 = "--tensor-model-parallel-size 2 --sequence-parallel --use-mc2 "
CASES = (
    Case("TP2+SP", 2, _TP2, "qwen3", "documents"),
    Case("TP2+SP, shared parameters", 4, _TP2 + "--data-parallel-sharding-strategy optim_grads_params", "qwen2"),
    Case("TP2+SP PP2 ZBV", 4, _TP2 + "--pipeline-model-parallel-size 2 --pipeline-schedule zbv", "qwen2"),
    Case("TP2+SP EP2", 2,
         _TP2 + "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1", "qwen2-moe"),
)  # fmt: skip
QUICK = frozenset({"TP2+SP"})
DENSE = {"npu_fusion_attention", "npu_rms_norm", "npu_add_rms_norm", "npu_rotary_mul", "npu_swiglu"}
MC2 = {"npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"}
MIXTURE = {"npu_grouped_matmul", "npu_moe_token_permute", "npu_moe_token_unpermute"}


@contextmanager
def the_vendors_rows(folder: Path, rank: int) -> Iterator[None]:
    """As on a device that has the operators; afterwards, which of them were called."""
    from tessel.parallel.overlap import FusedProducts
    from tessel.runtime import device as devices

    vendor_operators.register()
    with (
        mock.patch("tessel.model.kernels.vendor_kernels_available", lambda device: (True, "a test has operators")),
        mock.patch.object(devices, "fused_products_available", lambda *_: (True, "MC2 of a test")),
        mock.patch.object(devices, "communicator_name", lambda group, device: group.group_name),
        mock.patch.object(FusedProducts, "takes", lambda self, *sizes: True),
    ):
        yield
    (folder / f"{rank}.calls.json").write_text(json.dumps(vendor_operators.CALLS))


@pytest.mark.parametrize("case", marked(CASES, QUICK, key=lambda case: case.name))
def test_a_run_through_the_rows_is_that_of_plain_kernels(case: Case, work: Path, reference: Reference) -> None:
    save = work / "vendor-rows"
    line = arguments(case.flags, case.family, case.variant, work)
    train(case.num_processes, line, save, recorder=f"{__name__}:{the_vendors_rows.__name__}")
    deviation = compare(read(save, case.num_processes), reference(*case.reference))
    assert deviation.loss <= 1e-5 and deviation.grad_norm <= 1e-5
    folder = work / "vendor-rows.ranks"
    assert "--tp-comm-overlap: MC2 of a test" in (folder / "0.out").read_text()
    expected = DENSE | MC2 | (MIXTURE if "moe" in case.family else set())
    for rank in range(case.num_processes):
        assert json.loads((folder / f"{rank}.calls.json").read_text()).keys() == expected
    forget(save)
