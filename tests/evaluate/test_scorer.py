"""Log-probabilities of many continuations, shared beginnings computed once, against transformers one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tessel.errors import TesselError
from tessel.evaluate.scorer import Scorer
from tessel.generate.engine import load_model

MakeFolder = Callable[..., Path]


def pairs_with_stems() -> list[tuple[list[int], list[int]]]:
    """Two stems, questions of several lengths, answers of one to four tokens; a context inside another; one token."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return [int(i) for i in draw.integers(0, 300, length)]

    pairs = []
    for stem in (ids(40), ids(25)):
        for _ in range(6):
            question = stem + ids(int(draw.integers(1, 25)))
            pairs += [(question, ids(int(draw.integers(1, 5)))) for _ in range(3)]
        pairs.append((stem, [5]))
        pairs.append((stem[:18], [1, 2, 3]))
    return [*pairs, ([3], [4])]


@pytest.mark.parametrize("max_texts", [1, 4, 16])
def test_scores_are_those_of_each_text_alone(max_texts: int, tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen2")
    model, _ = load_model(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs = pairs_with_stems()
    scorer = Scorer(model, max_texts=max_texts)
    found = dict(scorer.scores(pairs))
    assert found.keys() == set(range(len(pairs)))
    for number, (context, answer) in enumerate(pairs):
        with torch.no_grad():
            logits = reference(torch.tensor([[*context, *answer]])[:, :-1]).logits[0, -len(answer) :]
        wanted = float(logits.log_softmax(-1)[range(len(answer)), answer].sum())
        assert found[number].logprob == pytest.approx(wanted, abs=1e-4)
        assert found[number].is_greedy == bool((logits.argmax(-1) == torch.tensor(answer)).all())
    assert scorer.counts.computed_tokens < 0.5 * scorer.counts.text_tokens


def test_answers_after_one_context_are_one_text(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    scorer = Scorer(model)
    assert len(dict(scorer.scores([([1, 2, 3], [answer]) for answer in range(4)]))) == 4
    assert scorer.counts.text_tokens == scorer.counts.computed_tokens == 3


def test_a_text_longer_than_the_context_loses_its_beginning(tiny_hf_folder: MakeFolder) -> None:
    model, config = load_model(tiny_hf_folder("qwen2", max_position_embeddings=20))
    assert config.max_position_embeddings == 20
    scorer = Scorer(model)
    long = dict(scorer.scores([(list(range(30)), [7, 8])]))
    short = dict(Scorer(model).scores([(list(range(11, 30)), [7, 8])]))
    assert long == short and scorer.counts.cut_texts == 1
    with pytest.raises(TesselError, match="An answer of 21 tokens is longer than the model's context"):
        list(scorer.scores([([1], list(range(21)))]))
    with pytest.raises(TesselError, match="no tokens"):
        list(scorer.scores([([], [1])]))
