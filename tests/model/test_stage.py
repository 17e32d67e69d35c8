"""Parts of a model, one after another, are the model."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from tessel.layout.stages import Stages, stages_of
from tessel.model.config import ModelConfig
from tessel.model.init import initialize_
from tessel.model.stage import keep_stage
from tessel.model.transformer import Transformer

SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def build(tied: bool) -> Transformer:
    config = ModelConfig.from_hf({**SHAPE, "tie_word_embeddings": tied})
    model = Transformer(config)
    initialize_(model, config, std=0.2, seed=1)
    return model


def parts_of(stages: Stages, tied: bool) -> list[Transformer]:
    return [keep_stage(build(tied), stage) for stage in stages.stages]


@pytest.mark.parametrize("layer_list", [(3,), (1, 2), (0, 1, 0, 2, 0)])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_are_the_model(tied: bool, layer_list: tuple[int, ...]) -> None:
    parts = parts_of(stages_of(3, len(layer_list), layer_list=layer_list), tied)
    generator = torch.Generator().manual_seed(0)
    tokens_BS, labels_BS = torch.randint(0, 50, (2, 2, 12), generator=generator)
    segments_BS = torch.arange(12).div(5, rounding_mode="floor").expand(2, -1)
    weights_BS = torch.rand(2, 12, generator=generator)
    x = tokens_BS
    for part in parts:
        x = part(x, None, segments_BS, labels_BS=labels_BS, weights_BS=weights_BS)
    x.backward()
    whole = build(tied)
    expected = whole(tokens_BS, None, segments_BS, labels_BS=labels_BS, weights_BS=weights_BS)
    expected.backward()
    assert torch.equal(x, expected)
    for name, parameter in whole.named_parameters():
        copies = [dict(part.named_parameters())[name].grad for part in parts if name in dict(part.named_parameters())]
        assert len(copies) == (2 if tied and "embed" in name and len(parts) > 1 else 1), name
        total = torch.stack([copy for copy in copies if copy is not None]).sum(0)
        if len(copies) == 1:
            assert torch.equal(total, parameter.grad)
        else:
            torch.testing.assert_close(total, parameter.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_part_has_no_more_than_it_runs(tied: bool) -> None:
    first, middle, last = ([*dict(part.named_parameters())] for part in parts_of(stages_of(3, 3), tied))
    ends = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert [name for name in first if name in ends] == ends[:1]
    assert all(name.startswith("model.layers.1.") for name in middle)
    assert sorted(name for name in last if name in ends) == sorted([ends[0], ends[1]] if tied else ends[1:])
    names = {name for name, _ in build(tied).named_parameters()}
    assert set(chain(first, middle, last)) == names


def test_a_part_of_a_cut_sequence_is_told_positions() -> None:
    """Hidden states of half the sequence do not say how long it is; the positions do."""
    part = keep_stage(build(False), stages_of(3, 3).stages[1])
    hidden_BSE = torch.randn(1, 12, 32)
    positions_BS = torch.arange(12)[None]
    assert torch.equal(part(hidden_BSE), part(hidden_BSE, positions_BS))
    assert not torch.equal(part(hidden_BSE), part(hidden_BSE, 2 * positions_BS))
