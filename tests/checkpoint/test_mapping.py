"""Models with names of their own: what model_mapping.yaml says is read, trained on, converted, and written back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tessel.checkpoint import huggingface
from tessel.checkpoint.detect import open_model
from tessel.checkpoint.huggingface import open_folder
from tessel.cli import main
from tessel.errors import TesselError
from tessel.generate.engine import load_model
from tessel.model.config import ModelConfig
from tessel.model.mapping import MAPPING_FILE, ModelMapping
from tests.checkpoint.megatron import different
from tests.train import runs

MAPPING = """\
family: llama
config:
  text.n_embd: hidden_size
  text.n_layer: num_hidden_layers
  n_head: num_attention_heads
  n_kv_head: num_key_value_heads
  n_inner: intermediate_size
  n_vocab: vocab_size
  tied: tie_word_embeddings
  norm_eps: rms_norm_eps
set:
  hidden_act: silu
tensors:
  transformer.wte.weight: model.embed_tokens.weight
  transformer.ln_f.weight: model.norm.weight
  transformer.h.{layer}.ln_1.weight: model.layers.{layer}.input_layernorm.weight
  transformer.h.{layer}.ln_2.weight: model.layers.{layer}.post_attention_layernorm.weight
  transformer.h.{layer}.attn.qkv.{kind}:
    parts:
      - model.layers.{layer}.self_attn.q_proj.{kind}
      - model.layers.{layer}.self_attn.k_proj.{kind}
      - model.layers.{layer}.self_attn.v_proj.{kind}
    order: groups
  transformer.h.{layer}.attn.out.weight:
    name: model.layers.{layer}.self_attn.o_proj.weight
    transpose: true
  transformer.h.{layer}.attn.out.bias: model.layers.{layer}.self_attn.o_proj.bias
  transformer.h.{layer}.mlp.gate_up.weight:
    parts: ["model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"]
    transpose: true
  transformer.h.{layer}.mlp.down.weight: model.layers.{layer}.mlp.down_proj.weight
  head.weight: lm_head.weight
"""
MakeFolder = Callable[..., Path]


def own_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a tiny Llama (4 heads of 8, 2 of keys and values) as MAPPING says."""
    own = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "head.weight": tensors["lm_head.weight"],
    }
    for layer in range(2):
        theirs, ours = f"model.layers.{layer}.", f"transformer.h.{layer}."
        own[ours + "ln_1.weight"] = tensors[theirs + "input_layernorm.weight"]
        own[ours + "ln_2.weight"] = tensors[theirs + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            q, k, v = (tensors[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv")
            groups = [torch.cat([q[16 * g : 16 * g + 16], k[8 * g : 8 * g + 8], v[8 * g : 8 * g + 8]]) for g in (0, 1)]
            own[f"{ours}attn.qkv.{kind}"] = torch.cat(groups)
        own[ours + "attn.out.weight"] = tensors[theirs + "self_attn.o_proj.weight"].T.contiguous()
        own[ours + "attn.out.bias"] = tensors[theirs + "self_attn.o_proj.bias"]
        both = torch.cat([tensors[theirs + "mlp.gate_proj.weight"], tensors[theirs + "mlp.up_proj.weight"]])
        own[ours + "mlp.gate_up.weight"] = both.T.contiguous()
        own[ours + "mlp.down.weight"] = tensors[theirs + "mlp.down_proj.weight"]
    return own


def own_folder(folder: Path, original: Path) -> Path:
    """The model of `original` under the names of MAPPING."""
    folder.mkdir()
    raw = json.loads((original / "config.json").read_text())
    config = {key: raw[key] for key in ("max_position_embeddings", "attention_bias", "rope_parameters", "dtype")}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "flavour": "strawberry"}
    config["text"] = {"n_embd": raw["hidden_size"], "n_layer": raw["num_hidden_layers"], "kept": [1]}
    config |= {"n_head": raw["num_attention_heads"], "n_kv_head": raw["num_key_value_heads"]}
    config |= {"n_inner": raw["intermediate_size"], "n_vocab": raw["vocab_size"], "tied": False}
    config |= {"norm_eps": raw["rms_norm_eps"], "hidden_act": "swiglu"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / MAPPING_FILE).write_text(MAPPING)
    save_file(own_tensors(load_file(original / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    for path in original.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture
def original(tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path) -> Path:
    return tiny_hf_folder("llama", tokenizer=tiny_tokenizer_folder, attention_bias=True)


@pytest.fixture
def own(original: Path, tmp_path: Path) -> Path:
    return own_folder(tmp_path / "own", original)


def test_it_is_the_model_under_the_familys_names(original: Path, own: Path) -> None:
    model = open_folder(own)
    assert model.config == ModelConfig.from_folder(original)
    assert different(model.tensors, open_folder(original).tensors) == []
    name = "model.layers.1.self_attn.k_proj.weight"
    box = (slice(3, 14), slice(5, 9))
    assert torch.equal(model.tensors[name].read(box), open_folder(original).tensors[name].read(box))


@torch.no_grad()
def test_logits_are_those_of_transformers(original: Path, own: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(40).reshape(2, 20) * 7
    logits = load_model(own)[0](tokens)
    assert torch.equal(logits, load_model(original)[0](tokens))
    expected = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_an_export_has_the_names_it_came_with(original: Path, own: Path, tmp_path: Path) -> None:
    model, config = load_model(own)
    huggingface.export(model.named_parameters(), config, tmp_path / "out", torch.float32)
    written, expected = load_file(tmp_path / "out/model.safetensors"), load_file(own / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((own / "config.json").read_text())
    assert (tmp_path / "out" / MAPPING_FILE).read_text() == MAPPING


@pytest.mark.parametrize("to", ["torch", "legacy"])
def test_a_round_trip_gives_the_same_files(own: Path, tmp_path: Path, to: str) -> None:
    degrees = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    assert main(["convert", "--load", str(own), "--save", str(tmp_path / "mg"), "--to", to, *degrees]) == 0
    assert main(["convert", "--load", str(tmp_path / "mg"), "--save", str(tmp_path / "back"), "--to", "hf"]) == 0
    for path in own.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_cast_and_lost_headers_give_its_names_too(own: Path, tmp_path: Path) -> None:
    there, back = str(tmp_path / "mg"), tmp_path / "back"
    assert main(["convert", "--load", str(own), "--save", there, "--to", "torch", "--params-dtype", "bf16"]) == 0
    (tmp_path / "mg/huggingface/safetensors.json").unlink()
    assert main(["convert", "--load", there, "--save", str(back), "--to", "hf"]) == 0
    expected = load_file(own / "model.safetensors")
    written = load_file(back / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name].bfloat16()) for name in expected)
    config = json.loads((back / "config.json").read_text())
    assert (config["dtype"], config["model_type"], config["flavour"]) == ("bfloat16", "mine", "strawberry")
    assert "hidden_size" not in config and config["text"] == {"n_embd": 32, "n_layer": 2, "kept": [1]}


def test_it_trains_and_generates(original: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = runs.write_data(tmp_path / "data")
    for name, folder in (("mine", own), ("theirs", original)):
        assert main(runs.loading(folder, data, tmp_path / name, 2)) == 0
    written = load_file(tmp_path / "mine/hf/model.safetensors")
    expected = own_tensors(load_file(tmp_path / "theirs/hf/model.safetensors"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(written["head.weight"], load_file(own / "model.safetensors")["head.weight"])
    run, export = open_model(tmp_path / "mine"), open_folder(tmp_path / "mine/hf")
    assert (run.format, different(run.tensors, export.tensors)) == ("torch_dcp", [])
    capsys.readouterr()
    said_of = []
    for folder in (own, original):
        words = ["--load", str(folder), "--prompt", "the quick", "--max-new-tokens", "5", "--device", "cpu"]
        assert main(["generate", *words]) == 0
        said_of.append(capsys.readouterr().out)
    assert said_of[0] == said_of[1]


def test_inspect_knows_the_tensors(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(own), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["family"], said["layers"], said["missing_tensors"], said["surplus_tensors"]) == ("llama", 2, [], [])


def test_experts_by_other_names(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    original = tiny_hf_folder("qwen3_moe")
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    (folder / MAPPING_FILE).write_text(
        "family: qwen3_moe\n"
        "tensors:\n"
        "  model.layers.{layer}.moe.{expert}.fc.weight:\n"
        "    parts:\n"
        "      - model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight\n"
        "      - model.layers.{layer}.mlp.experts.{expert}.up_proj.weight\n"
        "  model.layers.{layer}.moe.{expert}.out.weight: model.layers.{layer}.mlp.experts.{expert}.down_proj.weight\n"
        "  model.layers.{layer}.router.weight: model.layers.{layer}.mlp.gate.weight\n"
    )
    plain = open_folder(original).tensors
    own: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        layer = name.removesuffix("mlp.experts.gate_proj")
        if name.endswith("mlp.experts.gate_proj"):
            up, down = (plain[f"{layer}mlp.experts.{part}_proj"].read() for part in ("up", "down"))
            for number, gate in enumerate(tensor.read()):
                own[f"{layer}moe.{number}.fc.weight"] = torch.cat([gate, up[number]])
                own[f"{layer}moe.{number}.out.weight"] = down[number].clone()
        elif "experts" not in name:
            own[name.replace("mlp.gate.", "router.")] = tensor.read()
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    assert different(open_folder(folder).tensors, plain) == []
    words = ["--to", "torch", "--expert-model-parallel-size", "5"]
    assert main(["convert", "--load", str(folder), "--save", str(tmp_path / "mg"), *words]) == 0
    assert main(["convert", "--load", str(tmp_path / "mg"), "--save", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    model, config = load_model(folder)
    huggingface.export(model.named_parameters(), config, tmp_path / "out", torch.float32)
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == own.keys() and all(torch.equal(written[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("family: gpt2", "family is 'gpt2': it must be one of qwen2"),
        ("famly: llama", "unknown key famly; nearest: family"),
        ("- 1", "holds a list"),
        ("family: [", "is not YAML"),
        ("family: 2001-99-99", "is not YAML"),
        ("family: llama\nfamily: llama", "given twice"),
        ("family: llama\nconfig: [a]", "config must be a mapping"),
        ("family: llama\nconfig: {a: 1}", "config.a must be the name of a key"),
        ("family: llama\nconfig: {a: x, b: x}", "config has x twice"),
        ("family: llama\ntensors: {a: 1}", "tensors.a must be a name, or a mapping"),
        ("family: llama\ntensors: {a: {nam: b}}", "unknown key nam; nearest: name"),
        ("family: llama\ntensors: {a: {}}", "must have a name, or parts"),
        ("family: llama\ntensors: {a: {name: b, parts: [c]}}", "both name and parts"),
        ("family: llama\ntensors: {a: {parts: [b, c], order: groups}}", "order is 'groups'"),
        ("family: llama\ntensors: {a: {name: b, transpose: 1}}", "transpose is 1"),
        ("family: llama\ntensors: {'a.{layer}': b}", "must have the same of"),
        ("family: llama\ntensors: {'a.{number}': 'b.{number}'}", "may stand in braces"),
        ("family: llama\ntensors: {'a.{layer!r}': 'b.{layer}'}", "may stand in braces"),
        ("family: llama\ntensors: {a: x, b: x}", "tensors has x twice"),
    ],
)
def test_a_mapping_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / MAPPING_FILE).write_text(text)
    with pytest.raises(TesselError, match=words):
        ModelMapping.of_folder(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("model.norm.weight", "model.nrm.weight", r"missing: model\.norm\.weight.*surplus: model\.nrm\.weight"),
        ("self_attn.q_proj.{kind}", "self_attn.quark.{kind}", "has no model.layers.0.self_attn.quark"),
        ("mlp.gate_proj.weight", "mlp.down_proj.weight", "twice on the right"),
        ("mlp.up_proj.weight", "self_attn.v_proj.weight", "has model.layers.*twice, by|rows. Check the sizes"),
    ],
)
def test_a_mapping_of_another_model(own: Path, old: str, new: str, words: str) -> None:
    (own / MAPPING_FILE).write_text(MAPPING.replace(old, new))
    with pytest.raises(TesselError, match=words):
        open_folder(own)


def test_what_cannot_be_transposed_or_said(own: Path, tmp_path: Path) -> None:
    entry = "transformer.h.{layer}.attn.out.bias: model.layers.{layer}.self_attn.o_proj.bias"
    wrong = entry.replace(": ", ":\n    transpose: true\n    name: ")
    (own / MAPPING_FILE).write_text(MAPPING.replace(entry, wrong))
    with pytest.raises(TesselError, match=r"says to transpose transformer\.h\.0\.attn\.out\.bias, which is \(32,\)"):
        open_folder(own)
    (own / MAPPING_FILE).write_text(MAPPING.replace("hidden_act: silu", "hidden_act: silu\n  dtype: float16"))
    config = ModelConfig.from_folder(own)
    with pytest.raises(TesselError, match="sets dtype to 'float16' and the model has 'float32'"):
        huggingface.write_metadata(tmp_path / "out", config, torch.float32)


def test_two_entries_for_one_tensor(own: Path, tmp_path: Path) -> None:
    model, _ = load_model(own)
    (own / MAPPING_FILE).write_text(MAPPING.replace("tensors:\n", "tensors:\n  transformer.wte.{kind}: other.{kind}\n"))
    config = ModelConfig.from_folder(own)
    with pytest.raises(TesselError, match="which another entry is for"):
        huggingface.export(model.named_parameters(), config, tmp_path / "out", torch.float32)


@torch.no_grad()
def test_the_example_of_the_guide(tiny_hf_folder: MakeFolder, tmp_path: Path, repository: Path) -> None:
    text = (repository / "docs/MIGRATION.md").read_text(encoding="utf-8")
    original = tiny_hf_folder("llama")
    tensors = load_file(original / "model.safetensors")
    names = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"mlp.{part}_proj": f"feed_forward.{w}" for part, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))}
    own = {}
    for name, tensor in tensors.items():
        q = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        if name == q and "q_proj" in name:
            heads = tensor.reshape(2, 2, 8, 32)  # of keys and values; queries for each; features
            k, v = (tensors[name.replace("q_proj", part)].reshape(2, 1, 8, 32) for part in ("k_proj", "v_proj"))
            own[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat([heads, k, v], 1).reshape(64, 32)
        elif name == q:
            new = name
            for ours, theirs in names.items():
                new = new.replace(ours, theirs)
            own[new] = tensor
    folder = tmp_path / "own"
    folder.mkdir()
    config = json.loads((original / "config.json").read_text())
    rope = {
        "rope_theta": config.pop("rope_parameters")["rope_theta"],
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    config |= rope | {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / MAPPING_FILE).write_text(text.partition("```yaml\n")[2].partition("```")[0])
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    tokens = torch.arange(40).reshape(2, 20) * 7
    assert torch.equal(load_model(folder)[0](tokens), load_model(original)[0](tokens))
