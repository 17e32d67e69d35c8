"""Beam search: the sequences and scores of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessel.errors import TesselError, UsageError
from tessel.generate.beam import Beam, BeamOptions, beam_search
from tessel.generate.cache import KeyValueCache
from tessel.generate.engine import generate_tokens, load_model
from tessel.generate.sampling import GREEDY, Sampling
from tessel.model.transformer import Transformer

MakeFolder = Callable[..., Path]
PROMPT = [5, 300, 17, 17, 42]


def of_transformers(folder: Path, prompt: list[int], **options: Any) -> list[Beam]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=306,
        do_sample=False,
        num_return_sequences=options["num_beams"],
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    # What follows a text that ended sooner is padding; -1 in its indices.
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    sequences = [row[len(prompt) : len(prompt) + n].tolist() for row, n in zip(out.sequences, lengths, strict=True)]
    return [Beam(tuple(ids), score) for ids, score in zip(sequences, out.sequences_scores.tolist(), strict=True)]


def assert_same(ours: list[Beam], theirs: list[Beam]) -> None:
    assert [beam.tokens for beam in ours] == [beam.tokens for beam in theirs]
    assert [beam.score for beam in ours] == pytest.approx([beam.score for beam in theirs], abs=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_moe"])
def test_beams_are_those_of_transformers(family: str, tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder(family)
    model, _ = load_model(folder)
    free = beam_search(model, PROMPT, BeamOptions(4), max_new_tokens=20)
    assert_same(free, of_transformers(folder, PROMPT, num_beams=4, max_new_tokens=20))
    assert len({beam.tokens for beam in free}) == 4
    # Tokens that the search meets end some beams early.
    stops = sorted({free[0].tokens[4], free[1].tokens[-2], free[2].tokens[7]})
    for early_stopping in (False, True, "never"):
        for length_penalty in (1.0, 0.0, -1.0, 2.0):
            ours = beam_search(
                model, PROMPT, BeamOptions(3, length_penalty, early_stopping), max_new_tokens=16, stop_ids=stops
            )
            theirs = of_transformers(
                folder,
                PROMPT,
                num_beams=3,
                max_new_tokens=16,
                eos_token_id=stops,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
            )
            assert_same(ours, theirs)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "mixtral", "qwen2_moe"])
def test_beams_of_every_other_family(family: str, tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder(family)
    model, _ = load_model(folder)
    ours = beam_search(model, PROMPT, BeamOptions(4), max_new_tokens=20)
    assert_same(ours, of_transformers(folder, PROMPT, num_beams=4, max_new_tokens=20))


def test_the_repetition_penalty_is_that_of_transformers(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen2")
    model, _ = load_model(folder)
    sampling = Sampling(greedy=True, repetition_penalty=1.4)
    ours = beam_search(model, PROMPT, BeamOptions(3), max_new_tokens=12, sampling=sampling)
    assert_same(ours, of_transformers(folder, PROMPT, num_beams=3, max_new_tokens=12, repetition_penalty=1.4))


def test_beams_of_a_long_text_over_a_sliding_window(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("mistral", sliding_window=6)
    model, _ = load_model(folder)
    prompt = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    ours = beam_search(model, prompt, BeamOptions(4), max_new_tokens=12)
    assert_same(ours, of_transformers(folder, prompt, num_beams=4, max_new_tokens=12))


def test_the_context_ends_a_search(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2", max_position_embeddings=12))
    found = beam_search(model, PROMPT, BeamOptions(2), max_new_tokens=50)
    assert [len(beam.tokens) for beam in found] == [8, 8]
    with pytest.raises(TesselError, match="no tokens"):
        beam_search(model, [], BeamOptions(2), max_new_tokens=50)


def test_drawn_beams_follow_the_seed_and_the_limits(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))

    def draw(seed: int, sampling: Sampling) -> list[Beam]:
        return beam_search(model, PROMPT, BeamOptions(3), max_new_tokens=8, sampling=sampling, seed=seed)

    wide = Sampling(temperature=1.5)
    assert draw(1, wide) == draw(1, wide) != draw(2, wide)
    only = draw(1, Sampling(top_k=1))
    assert only[0].tokens == tuple(generate_tokens(model, PROMPT, max_new_tokens=8, sampling=GREEDY))


def test_numbers_out_of_range() -> None:
    with pytest.raises(UsageError, match="num_beams 1 must be"):
        BeamOptions(1)
    with pytest.raises(UsageError, match="early_stopping 'soon' must be"):
        BeamOptions(2, early_stopping="soon")  # type: ignore[arg-type]


@pytest.mark.parametrize("sources", [[0, 1, 2], [2, 2, 0], [1, 1, 1], [2, 0, 1], [1, 2, 2]])
def test_slots_take_over_what_others_held(sources: list[int], tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    texts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    cache = KeyValueCache()
    slots = [cache.open() for _ in texts]
    for slot, ids in zip(slots, texts, strict=True):
        _next(model, cache, [(slot, ids)])
    cache.reorder(slots, [slots[source] for source in sources])
    for slot, source in zip(slots, sources, strict=True):
        fresh = KeyValueCache()
        slot_of_all = fresh.open()
        expected = _next(model, fresh, [(slot_of_all, [*texts[source], 50])])[0]
        torch.testing.assert_close(_next(model, cache, [(slot, [50])])[0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def _next(model: Transformer, cache: KeyValueCache, new: list[tuple[int, list[int]]]) -> torch.Tensor:
    cache.stage((slot, len(ids)) for slot, ids in new)
    tokens = torch.tensor([[token for _, ids in new for token in ids]])
    logits = model(tokens, cache.positions("cpu"), cache=cache, logits=cache.last_tokens())
    cache.commit()
    return logits[0]
