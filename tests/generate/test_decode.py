"""The work of a step: weights arranged for few rows, texts kept together, and nothing that grows with the context."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tessel.checkpoint.fill import fill_model
from tessel.checkpoint.huggingface import read_tensors
from tessel.config.tokenizer import Tokenizer
from tessel.config.verbs import Loading
from tessel.generate import engine
from tessel.generate.batcher import Batcher
from tessel.generate.cache import KeyValueCache
from tessel.generate.engine import generate_tokens, load_model, suit_few_rows
from tessel.generate.load import open_for_use
from tessel.generate.packed import PackedLinear, suit_many_texts, suit_one_text
from tessel.generate.request import Request
from tessel.generate.sampling import GREEDY, Sampling
from tessel.model.layers import Linear
from tessel.model.transformer import Transformer

MakeFolder = Callable[..., Path]


def is_by_columns(weight: torch.Tensor) -> bool:
    return weight.stride() == (1, weight.shape[0])


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("llama", False), ("qwen2_moe", False)])
def test_weights_by_columns_give_the_same_tokens(
    family: str, tied: bool, tiny_hf_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_hf_folder(family, tie_word_embeddings=tied)
    arranged, _ = load_model(folder)
    assert is_by_columns(arranged.head_weight) and is_by_columns(arranged.model.embed_tokens.weight)
    assert all(parameter.is_contiguous() for parameter in arranged.layers.parameters())
    monkeypatch.setattr(engine, "suit_few_rows", lambda *_: None)
    plain, _ = load_model(folder)
    assert all(parameter.is_contiguous() for parameter in plain.parameters())
    for (name, ours), theirs in zip(arranged.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    tokens = [
        list(generate_tokens(model, [5, 300, 17], max_new_tokens=30, sampling=GREEDY)) for model in (arranged, plain)
    ]
    assert tokens[0] == tokens[1]


def linears(model: torch.nn.Module) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mixtral", "qwen2_moe"])
def test_weights_in_blocks_give_the_same_tokens(family: str, tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder(family)
    plain, _ = load_model(folder)
    packed, _ = load_model(folder)
    suit_many_texts(packed)
    by_columns, _ = load_model(folder)
    suit_one_text(by_columns)
    assert is_by_columns(by_columns.layers["0"].self_attn.q_proj.weight) == (family == "qwen3"), "where it is tall"
    assert {name for name, linear in linears(packed).items() if type(linear) is Linear} == {"lm_head"}
    for name, linear in linears(plain).items():
        assert torch.equal(linears(packed)[name].dense_weight(), linear.weight), name
    held = [sum(parameter.nbytes for parameter in model.parameters()) for model in (plain, packed, by_columns)]
    assert len(set(held)) == 1
    for prompt, number in (((5, 300, 17), 60), (range(100), 20), ((7,), 3)):
        tokens = [
            list(generate_tokens(model, tuple(prompt), max_new_tokens=number, sampling=GREEDY))
            for model in (plain, packed, by_columns)
        ]
        assert tokens[0] == tokens[1] == tokens[2]
    whole = [model(torch.arange(64)[None]) for model in (plain, packed)]
    torch.testing.assert_close(whole[0], whole[1], rtol=0, atol=1e-5)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this CPU (AVX-512 or AMX)"
)
def test_blocks_in_bf16_give_the_same_logits(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen2")
    plain, packed = (load_model(folder, dtype=torch.bfloat16)[0] for _ in range(2))
    suit_one_text(packed)
    assert {name for name, linear in linears(packed).items() if type(linear) is Linear} == {"lm_head"}
    for name, linear in linears(plain).items():
        assert torch.equal(linears(packed)[name].dense_weight(), linear.weight), name
    for number in (1, 5, 40):
        tokens = torch.arange(number)[None]
        torch.testing.assert_close(packed(tokens), plain(tokens), rtol=0, atol=0.02)


def test_what_is_used_on_this_cpu_is_in_blocks(tiny_hf_folder: MakeFolder) -> None:
    folder = str(tiny_hf_folder("qwen3"))
    tokenizer = Tokenizer(tokenizer_type="NullTokenizer")
    for bf16, together in ((False, True), (False, False), (True, True), (True, False)):
        with open_for_use(Loading(load=folder, device="cpu", bf16=bf16), tokenizer, together=together) as opened:
            assert isinstance(opened.model, torch.nn.Module)
            kinds = {type(linear) for name, linear in linears(opened.model).items() if name != "lm_head"}
            in_blocks = torch.ops.mkldnn._is_mkldnn_bf16_supported() if bf16 else together
            assert kinds == {PackedLinear if in_blocks else Linear}


class RowsOfProducts(TorchDispatchMode):
    """Notes how many rows the products with matrices in blocks have."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_linear_pointwise" in str(func):
            self.met.add(args[0].numel() // args[0].shape[-1])
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_products_in_blocks_take_few_numbers_of_rows() -> None:
    """oneDNN keeps a kernel for each for as long as the process lives."""
    plain = Linear(8, 24)
    torch.nn.init.normal_(plain.weight)
    packed, bias = PackedLinear(plain), torch.randn(24)
    with RowsOfProducts() as rows:
        for number in range(1, 513):
            x = torch.randn(1, number, 8)
            y = packed.product(x, bias)
            assert y.shape == (1, number, 24)
            torch.testing.assert_close(y, plain.product(x, bias), rtol=0, atol=1e-5)
    assert len(rows.met) == 16 + 2 * 8 + 3 * 4 and max(rows.met) == 512
    assert all(any(number <= met <= number * 5 / 4 for met in rows.met) for number in range(1, 513))


def test_only_fp32_on_a_cpu_is_arranged(tiny_hf_folder: MakeFolder) -> None:
    half, config = load_model(tiny_hf_folder("llama"), dtype=torch.bfloat16)
    assert all(parameter.is_contiguous() for parameter in half.parameters())
    with torch.device("meta"):
        model = Transformer(config)
    suit_few_rows(model, torch.device("meta"))
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_filling_keeps_the_strides_that_a_parameter_has(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen3")
    stored = read_tensors(folder)
    reference, config = load_model(folder)
    for by_columns in (True, False):
        with torch.device("meta"):
            model = Transformer(config)
        if by_columns:
            head = torch.empty(config.hidden_size, config.vocab_size, device="meta").t()
            model.lm_head.weight = torch.nn.Parameter(head)  # type: ignore[union-attr]
        fill_model(model, stored)
        assert is_by_columns(model.head_weight) == by_columns
        assert torch.equal(model.head_weight, reference.head_weight)


# ------------------------------------------------------------------------------------------ neighbours


def fill_slot(cache: KeyValueCache, slot: int, value: float, num_tokens: int) -> None:
    cache.stage([(slot, num_tokens)])
    q, k = torch.zeros(1, num_tokens, 2, 4), torch.full((1, num_tokens, 1, 4), value)
    for layer in range(2):
        cache.attend(layer, q, k, k + layer, None)
    cache.commit()


@torch.inference_mode()
def test_the_last_text_moves_into_the_room_of_one_that_ends() -> None:
    cache = KeyValueCache()
    slots = [cache.open() for _ in range(5)]
    for number, slot in enumerate(slots):
        fill_slot(cache, slot, float(number), 3 + number)
    cache.close(slots[1])
    cache.close(slots[0])
    left = cache.sorted_slots(slots[2:])
    assert left == [slots[3], slots[4], slots[2]], "in the rows of those that ended, and its own"
    cache.stage((slot, 1) for slot in left)
    assert len(cache._runs) == 1, "they attend in one call"
    q, k = torch.zeros(1, 3, 2, 4), torch.tensor([3.0, 4.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 1, 4)
    for layer in range(2):
        # All keys of a text are alike, and so are its values: what attention gives is the text's number.
        assert torch.allclose(cache.attend(layer, q, k, k + layer, None), (k + layer).expand(1, 3, 2, 4))
    cache.commit()
    assert [cache.length(slot) for slot in left] == [7, 8, 6]


@torch.inference_mode()
def test_a_text_that_outgrows_its_room_leaves_no_gap() -> None:
    cache = KeyValueCache()
    slots = [cache.open() for _ in range(3)]
    for number, slot in enumerate(slots):
        fill_slot(cache, slot, float(number), 64 if number == 0 else 5)
    cache.stage((slot, 1) for slot in slots)
    assert [run.rows for run in cache._runs] == [slice(0, 1), slice(1, 2), slice(0, 1)]
    q, k = torch.zeros(1, 3, 2, 4), torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 1, 4)
    assert torch.allclose(cache.attend(0, q, k, k, None), k.expand(1, 3, 2, 4))


@torch.inference_mode()
def test_kept_texts_do_not_part_those_that_run() -> None:
    cache = KeyValueCache()
    slots = [cache.open() for _ in range(4)]
    for number, slot in enumerate(slots):
        fill_slot(cache, slot, float(number), 5)
    running_bytes = cache.num_bytes
    cache.park(slots[1])
    left = cache.sorted_slots([slots[0], slots[2], slots[3]])
    cache.stage((slot, 1) for slot in left)
    assert len(cache._runs) == 1
    assert cache.num_bytes == running_bytes + 2 * 2 * 5 * 4 * 4, "of 2 layers keys and values, 5 tokens of 4 numbers"
    again = cache.fork(slots[1], 4)
    cache.close(slots[1])
    assert cache.num_bytes == running_bytes
    cache.stage([(again, 1)])
    k = torch.ones(1, 1, 1, 4)
    assert torch.allclose(cache.attend(0, torch.zeros(1, 1, 2, 4), k, k, None), torch.ones(1, 1, 2, 4))


# ------------------------------------------------------------------------------------------ work in a step


class Words:
    """Token 5 is "5 ". Counts the tokens that it is asked for."""

    num_decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.num_decoded += len(ids)
        return "".join(f"{i} " for i in ids)


def calls_of(work: Callable[[], Any]) -> int:
    """Calls of functions, in Python and from it, that a piece of work makes."""
    number = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return number


@pytest.mark.parametrize("number", [1, 6])
@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)]
)
def test_a_step_costs_as_much_python_late_as_early(number: int, sampling: Sampling, tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2", max_position_embeddings=1024))
    words = Words()
    batcher = Batcher(model, words)
    for i in range(number):
        prompt = tuple(range(i, 3 * i + 5))
        batcher.add(Request(prompt, sampling, 600, stop_strings=("\n\n",), seed=i, num_logprobs=3))
    # Each text's room doubles at 64, 128, 256, 512 tokens: these steps are between.
    steps = {40: (0, 0), 240: (0, 0), 480: (0, 0)}
    for step in range(1, 481):
        decoded, calls = words.num_decoded, calls_of(batcher.step)
        if step in steps:
            steps[step] = calls, words.num_decoded - decoded
    early, *later = steps.values()
    assert later == [early, early]
    assert early[1] == 3 * number, "the token, and the one before it twice"
