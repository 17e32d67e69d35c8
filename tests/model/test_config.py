"""config.json in all its spellings, what is refused, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tessel.errors import TesselError
from tessel.model.config import ModelConfig

BASE: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def hf(model_type: str, **overrides: Any) -> dict[str, Any]:
    return {"model_type": model_type, **BASE, **overrides}


@pytest.mark.parametrize(
    ("four", "five"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **_LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3}},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        ),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"rope_scaling": None}, {}),
    ],
)
def test_both_spellings_are_one_model(four: dict[str, Any], five: dict[str, Any]) -> None:
    old, new = ModelConfig.from_hf(hf("llama", **four)), ModelConfig.from_hf(hf("llama", **five))
    assert old == new
    assert old != ModelConfig.from_hf(hf("llama", rope_theta=123.0))


def test_the_context_before_scaling() -> None:
    """Outside the scaling, inside it, or the largest position, in this order, as in transformers."""
    yarn = {"rope_type": "yarn", "factor": 4.0}

    def original(**keys: Any) -> Any:
        scaling = ModelConfig.from_hf(hf("qwen2", **keys)).rope_scaling
        assert scaling is not None
        return scaling["original_max_position_embeddings"]

    assert original(rope_scaling=yarn) == 256
    assert original(rope_scaling={**yarn, "original_max_position_embeddings": 64}) == 64
    inside = {**yarn, "original_max_position_embeddings": 64}
    assert original(rope_scaling=inside, original_max_position_embeddings=32) == 32


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_absent_keys_mean_what_they_mean_to_transformers(model_type: str) -> None:
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    raw = {"model_type": model_type, **{key: BASE[key] for key in needed}, "num_attention_heads": 32}
    raw["hidden_size"] = 256
    ours = ModelConfig.from_hf(raw)
    theirs = transformers.AutoConfig.for_model(**raw)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or None)
    if ours.num_experts:
        for name in ("num_experts", "num_experts_per_tok"):
            assert getattr(ours, name) == getattr(theirs, name), name
        for name in ("moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob"):
            assert getattr(ours, name) == getattr(theirs, name, getattr(ours, name)), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.initializer_range == theirs.initializer_range


def test_sliding_windows() -> None:
    def windows(model_type: str, **keys: Any) -> list[int | None]:
        config = ModelConfig.from_hf(hf(model_type, **keys))
        return [config.window(layer) for layer in range(3)]

    assert windows("mistral", sliding_window=9) == [9, 9, 9]
    assert windows("mistral", sliding_window=None) == [None, None, None]
    assert windows("qwen2", sliding_window=9) == [None, None, None], "use_sliding_window is off"
    on = {"use_sliding_window": True, "sliding_window": 9}
    assert windows("qwen2", **on, max_window_layers=2) == [None, None, 9]
    mixed = ["sliding_attention", "full_attention", "full_attention"]
    assert windows("qwen3", **on, layer_types=mixed) == [9, None, None]
    assert windows("llama", sliding_window=9) == [None, None, None]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (hf("gpt2"), "model_type 'gpt2' .* supported are qwen2, qwen3, llama, mistral"),
        (hf("mixtral", num_local_experts=2, num_experts_per_tok=3), "num_experts_per_tok 3 is more than the 2 experts"),
        (hf("qwen3_moe", use_sliding_window=True), "use_sliding_window is not supported in a qwen3_moe model"),
        (hf("mixtral", router_jitter_noise=0.1), "router_jitter_noise is not supported"),
        (hf("mixtral", scoring_func="cosine"), "scoring_func 'cosine' is not supported"),
        (hf("qwen2_moe", mlp_only_layers=["0"]), "mlp_only_layers is .*: it must be a list of layers' numbers"),
        (hf("qwen2_moe", decoder_sparse_step=0), "decoder_sparse_step is 0: it must be a whole number above 0"),
        (BASE, r"model_type None \(architectures \[\]\) is not supported"),
        (hf("llama", hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (hf("llama", vocab_size=None), "lacks vocab_size"),
        (hf("llama", rope_scaling={"type": "dynamic", "factor": 2.0}), "'dynamic' is not supported; supported are"),
        (hf("llama", rope_scaling={"type": "llama3", "factor": 2.0}), "lacks low_freq_factor, high_freq_factor"),
        (hf("llama", partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (hf("llama", rope_parameters={"full_attention": {"rope_theta": 1.0}}), "differ between layer types"),
        (hf("llama", num_key_value_heads=3), "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (hf("llama", head_dim=7), "head_dim 7 is odd"),
        (hf("llama", quantization_config={"bits": 4}), "quantised weights are not supported"),
        (hf("qwen2", layer_types=["full_attention"]), "for each of 3 layers; it has 1"),
        (hf("qwen2", layer_types=["chunked_attention"] * 3), "kinds .'chunked_attention'"),
        (hf("qwen2", layer_types=["sliding_attention"] * 3), "use_sliding_window is off"),
    ],
)
def test_what_is_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(TesselError, match=message):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("hidden_size", "big", "a whole number above 0"),
        ("num_hidden_layers", 2.5, "a whole number above 0"),
        ("num_attention_heads", 0, "a whole number above 0"),
        ("max_position_embeddings", None, "a whole number above 0"),
        ("rms_norm_eps", None, "a number above 0"),
        ("rope_theta", "x", "a number above 0"),
        ("sliding_window", "x", "a number, 0 or more"),
        ("rope_scaling", [1], "an object"),
        ("rope_parameters", "x", "an object"),
        ("layer_types", "full_attention", "a list"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(key: str, value: Any, rule: str) -> None:
    raw = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ModelConfig.from_hf(raw)
    with pytest.raises(TesselError, match=f"{key} is .*: it must be {rule}"):
        ModelConfig.from_hf({**raw, key: value})


def test_a_rope_parameter_of_the_wrong_kind_is_named() -> None:
    raw = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(TesselError, match="factor of the RoPE parameters is 'x'"):
        ModelConfig.from_hf({**raw, "rope_scaling": {"rope_type": "linear", "factor": "x"}})


def test_architectures_name_the_family_where_model_type_is_absent() -> None:
    raw = {**BASE, "architectures": ["Qwen2ForCausalLM"]}
    assert ModelConfig.from_hf(raw).family == "qwen2"


def test_from_folder(tmp_path: Path) -> None:
    with pytest.raises(TesselError, match="config.json: no such file"):
        ModelConfig.from_folder(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(TesselError, match="config.json: not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    path.write_text("[]")
    with pytest.raises(TesselError, match="holds a list, not an object"):
        ModelConfig.from_folder(tmp_path)
    path.write_text(json.dumps(hf("gpt2")))
    with pytest.raises(TesselError, match="config.json: model_type 'gpt2'"):
        ModelConfig.from_folder(tmp_path)
    path.write_text(json.dumps(hf("qwen3")))
    assert ModelConfig.from_folder(str(tmp_path)).qk_norm


ROUND_TRIPS = [
    hf("qwen2", tie_word_embeddings=True, torch_dtype="bfloat16", eos_token_id=5, my_key={"a": 1}),
    hf("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1),
    hf("qwen2", head_dim=12, rope_scaling={"type": "yarn", "factor": 4.0}),
    hf("qwen3", attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 5e6}),
    hf("llama", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **_LLAMA3}, mlp_bias=True, attention_bias=True),
    hf("llama", rope_scaling={"type": "linear", "factor": 2.0}, initializer_range=0.05),
    hf("mistral", sliding_window=None, head_dim=16),
    hf("mistral", sliding_window=8, dtype="float16"),
    hf("mixtral", num_local_experts=3, num_experts_per_tok=1),
    hf("qwen2_moe", num_experts=3, num_experts_per_tok=2, mlp_only_layers=[0], qkv_bias=False),
    hf("qwen3_moe", num_experts=3, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=2, head_dim=16),
]


@pytest.mark.parametrize("raw", ROUND_TRIPS, ids=lambda raw: raw["model_type"])
def test_the_way_back(raw: dict[str, Any], tmp_path: Path) -> None:
    config = ModelConfig.from_hf(raw)
    written = config.to_hf()
    assert ModelConfig.from_hf(written) == config
    for key, value in raw.items():
        if key != "layer_types" and "rope" not in key:
            assert written[key] == value, key
    prefix = "".join(part.capitalize() for part in raw["model_type"].split("_"))
    assert written["architectures"] == [f"{prefix}ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ModelConfig.from_hf(theirs.to_dict()) == config
    assert type(theirs).__name__ == f"{prefix}Config"


@pytest.mark.parametrize("raw", ROUND_TRIPS, ids=lambda raw: raw["model_type"])
def test_transformers_4_reads_the_old_keys(raw: dict[str, Any]) -> None:
    """Without the keys that only transformers 5 knows, the file describes the same model."""
    config = ModelConfig.from_hf(raw)
    written = config.to_hf()
    assert written.pop("rope_parameters")["rope_theta"] == written["rope_theta"]
    written.pop("dtype", None)
    assert ModelConfig.from_hf(written) == config


def test_a_random_model_has_a_whole_config(tmp_path: Path) -> None:
    config = ModelConfig(
        family="qwen3",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        qk_norm=True,
        dtype="float32",
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    from tessel.layout.sharding import parameters

    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {name: rule.shape for name, rule in parameters(config).items()}


def test_sizes_that_no_model_has_take_no_time() -> None:
    with pytest.raises(TesselError, match="num_hidden_layers 1000000000 is more than 10,000"):
        ModelConfig.from_hf(hf("qwen3_moe", num_hidden_layers=10**9))
    with pytest.raises(TesselError, match="100000 experts in 3 layers are more than 200,000"):
        ModelConfig.from_hf(hf("qwen3_moe", num_experts=100_000))
    with pytest.raises(TesselError, match="hidden_size 7 is less than num_attention_heads 8"):
        ModelConfig.from_hf(hf("llama", hidden_size=7, num_attention_heads=8))
