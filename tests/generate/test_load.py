"""Models opened for use: with adapters, and dealt out over processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from tessel.config.tokenizer import Tokenizer
from tessel.config.verbs import Loading
from tessel.errors import TesselError, UsageError
from tessel.generate import load as loads
from tessel.generate.batcher import Batcher
from tessel.generate.beam import BeamOptions, beam_search
from tessel.generate.load import Opened, check_before_launch, open_for_use
from tessel.generate.request import Request
from tessel.generate.sampling import GREEDY, Sampling
from tests.parallel.processes import run

MakeFolder = Callable[..., Path]
NULL = Tokenizer(tokenizer_type="NullTokenizer")
PROMPTS = [(5, 300, 17, 17, 42), tuple(range(20)), (7,), tuple(range(30, 65))]


def texts(opened: Opened) -> list[list[int]]:
    """What the batcher makes of some prompts, greedy and drawn, and a search."""
    batcher = Batcher(opened.model, opened.tokenizer, device=opened.device, prefill_tokens=24, kept_tokens=100)
    sampled = Sampling(temperature=0.8, top_k=40)
    requests = [Request(p, sampled if i == 1 else GREEDY, 6 + i, seed=i) for i, p in enumerate(PROMPTS)]
    found: dict[int, list[int]] = {batcher.add(request): [] for request in requests}
    while batcher.num_running or batcher.num_waiting:
        for event in batcher.step():
            found[event.request] += [] if event.token is None else [event.token]
    beams = beam_search(opened.model, PROMPTS[0], BeamOptions(3), max_new_tokens=5, device=opened.device)
    return [*found.values(), *(list(beam.tokens) for beam in beams)]


def opened_texts(loading: Loading, world_size: int = 1) -> tuple[list[list[int]], int]:
    """`texts` of a model, on this process or its part of it, and the bytes of weights that it holds."""
    if distributed.is_initialized():
        rank = str(distributed.get_rank())
        os.environ.update(LOCAL_RANK=rank, RANK=rank, WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
        loads.process_group = joined  # type: ignore[assignment]
    with open_for_use(loading, NULL) as opened:
        assert isinstance(opened.model, torch.nn.Module)
        return texts(opened), sum(parameter.nbytes for parameter in opened.model.parameters())


@contextmanager
def joined(*_: Any) -> Iterator[Any]:
    """The process group that the test has made already."""
    from tessel.runtime.process import Processes

    yield Processes()


CASES = [
    ("qwen2", {"num_hidden_layers": 3}, 2, 1),
    ("qwen2", {"tie_word_embeddings": True}, 1, 2),
    ("llama", {}, 2, 2),
    ("qwen3_moe", {"num_experts": 4}, 2, 1),
    ("qwen2_moe", {"num_experts": 4, "num_key_value_heads": 1}, 2, 2),
]


@pytest.mark.parametrize(("family", "config", "tp", "pp"), CASES)
def test_processes_together_give_the_tokens_of_one(
    family: str, config: dict[str, Any], tp: int, pp: int, tiny_hf_folder: MakeFolder
) -> None:
    folder = str(tiny_hf_folder(family, **config))
    expected, whole_bytes = opened_texts(Loading(load=folder, device="cpu"))
    loading = Loading(load=folder, device="cpu", tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    for found, held_bytes in run(tp * pp, opened_texts, loading, tp * pp):
        assert found == expected
        assert held_bytes < 0.8 * whole_bytes


def peft_folder(folder: Path, base: Path | None) -> Path:
    from tessel.checkpoint.adapters import write_peft
    from tessel.layout.adapters import AdapterSpec, is_adapter
    from tessel.layout.sharding import parameters
    from tessel.model.config import ModelConfig

    assert base is not None
    spec = AdapterSpec(4, 8.0, (("q_proj",), ("v_proj",), ("down_proj",)))
    from dataclasses import replace

    config = replace(ModelConfig.from_folder(base), adapters=spec)
    names = {name: rule.shape for name, rule in parameters(config).items() if is_adapter(name)}
    generator = torch.Generator().manual_seed(5)
    write_peft(
        folder,
        ((name, 0.3 * torch.randn(shape, generator=generator)) for name, shape in names.items()),
        spec,
        str(base),
    )
    return folder


def test_adapters_beside_the_model(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    base = tiny_hf_folder("qwen2")
    plain, _ = opened_texts(Loading(load=str(base), device="cpu"))
    run_folder = tmp_path / "run"
    adapter = peft_folder(run_folder / "adapter", base)
    ways = [
        Loading(load=str(base), lora_load=str(adapter), device="cpu"),
        Loading(load=str(run_folder), device="cpu"),
        Loading(load=str(adapter), lora_r=4, device="cpu"),
        Loading(lora_load=str(run_folder), device="cpu"),
    ]
    found = [opened_texts(way)[0] for way in ways]
    assert found[0] != plain and found[1:] == found[:1] * 3
    together = Loading(load=str(run_folder), device="cpu", tensor_model_parallel_size=2, pipeline_model_parallel_size=1)
    assert [tokens for tokens, _ in run(2, opened_texts, together, 2)] == found[:1] * 2
    with pytest.raises(UsageError, match=r"--lora-r 8 \(stored: 4\)"):
        opened_texts(Loading(load=str(adapter), lora_r=8, device="cpu"))
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(TesselError, match="is an adapter, and the model that it was trained beside is not where"):
        opened_texts(Loading(load=str(run_folder), device="cpu"))


def test_layouts_that_do_not_fit(tiny_hf_folder: MakeFolder) -> None:
    folder = str(tiny_hf_folder("qwen2"))
    with pytest.raises(UsageError, match="3 does not divide the number of processes 1"):
        opened_texts(Loading(load=folder, device="cpu", tensor_model_parallel_size=3))
    with pytest.raises(UsageError, match="--tensor-model-parallel-size 3 does not divide the 4 attention heads"):
        check_before_launch(Loading(load=folder, tensor_model_parallel_size=3), NULL, 3)
    with pytest.raises(UsageError, match="4 processes are more than .* = 2 need: start 2, or raise a degree"):
        check_before_launch(Loading(load=folder, tensor_model_parallel_size=2), NULL, 4)
    check_before_launch(Loading(load=folder, tensor_model_parallel_size=2), NULL, 4, replicas=True)
