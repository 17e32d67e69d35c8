"""`tessel inspect` says what a path is, in text and as JSON, and what it looked for where it is nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel import commands
from tessel.data.indexed import IndexedDatasetWriter
from tessel.data.preprocess import preprocess_files
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError
from tessel.report.facts import bytes_text, count_text

Inspect = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Inspect:
    """What the verb prints."""

    def inspect(path: Path | str, *flags: str) -> str:
        capsys.readouterr()
        commands.inspect([str(path), *flags])
        return capsys.readouterr().out

    return inspect


def as_json(text: str) -> dict[str, Any]:
    assert text.count("\n") == 1
    values: dict[str, Any] = json.loads(text)
    return values


@pytest.fixture
def dataset(tiny_tokenizer_folder: Path, tmp_path: Path) -> str:
    rows = [{"text": ""}, {"text": "the quick\nbrown fox"}, {"text": "x" * 30}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    (written,) = preprocess_files([tmp_path / "a.jsonl"], tmp_path / "data", tokenizer, ["text"], append_eod=True)
    return written.prefix


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_dataset(run: Inspect, dataset: str, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(dataset + suffix)
    assert f"{dataset}: a dataset of Megatron's format" in text
    assert "3, 1 of them empty" in text
    assert "    the quick\n    brown fox<|endoftext|>" in text
    values = as_json(run(dataset + suffix, "--json"))
    lengths = [len(part) for part in np.split(np.arange(values["tokens"]), [values["first_document"]["tokens"]])]
    assert values["kind"] == "dataset"
    assert (values["sequences"], values["documents"], values["empty_documents"]) == (2, 3, 1)
    assert {key: values["lengths"][key] for key in ("min", "max", "mean", "median")} == {
        "min": min(lengths),
        "max": max(lengths),
        "mean": sum(lengths) / 2,
        "median": sum(lengths) / 2,
    }
    assert values["dtype"] == "uint16"
    assert values["first_document"]["document"] == 1
    assert values["first_document"]["text"] == "the quick\nbrown fox<|endoftext|>"
    assert values["metadata"]["append_eod"] is True


def test_dataset_of_other_tools(run: Inspect, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    with IndexedDatasetWriter(tmp_path / "other", np.int32) as writer:
        writer.add_document(tokenizer.encode("the fox"))
    text = run(tmp_path / "other")
    assert "as ids: " + " ".join(map(str, tokenizer.encode("the fox"))) in text
    assert "--tokenizer-name-or-path shows it as text" in text
    assert "    the fox" in run(tmp_path / "other", "--tokenizer-name-or-path", str(tiny_tokenizer_folder))


def test_dataset_without_tokens(run: Inspect, tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "none", np.int32) as writer:
        writer.add_document([], [])
    assert "no tokens" in run(tmp_path / "none")
    assert as_json(run(tmp_path / "none", "--json"))["lengths"] is None


def test_a_tokenizer_that_did_not_make_the_data_is_warned_of(
    run: Inspect, dataset: str, tiny_tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "changed"
    other.mkdir()
    for file in tiny_tokenizer_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "added_tokens.json").write_text("{}")
    commands.inspect([dataset, "--tokenizer-name-or-path", str(other)])
    assert "is not the tokenizer that made the data" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_model(run: Inspect, tiny_hf_folder: Callable[..., Path], family: str, tied: bool) -> None:
    import transformers

    folder = tiny_hf_folder(family, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    values = as_json(run(folder, "--json", "--tensors"))
    assert (values["kind"], values["family"], values["tied"]) == ("Hugging Face model", family, tied)
    assert values["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert values["dtypes"] == {"F32": values["tensors"]}
    assert (values["layers"], values["vocabulary"], values["tokenizer"]) == (2, 307, None)
    assert values["missing_tensors"] == values["surplus_tensors"] == []
    listed = {tensor["name"]: tensor["shape"] for tensor in values["tensor_list"]}
    assert listed == {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    text = run(folder)
    assert "model.layers.*.mlp.down_proj.weight  [32, 56]  F32  x 2" in text
    assert f"output layer {'tied' if tied else 'of its own'}" in text
    assert "model.layers.1.mlp.down_proj.weight  [32, 56]  F32  norm " in run(folder, "--tensors")


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_mixture_of_experts(run: Inspect, tiny_hf_folder: Callable[..., Path], family: str) -> None:
    folder = tiny_hf_folder(family)
    values = as_json(run(folder, "--json"))
    assert values["missing_tensors"] == values["surplus_tensors"] == []
    width, layers, experts = (56, 2, 4) if family == "mixtral" else (24, 2, 5)
    layers -= len(values["layers_without_experts"])
    assert (values["experts"], values["experts_per_token"], values["expert_intermediate_size"]) == (experts, 2, width)
    assert values["parameters"] - values["active_parameters"] == layers * (experts - 2) * 3 * 32 * width
    text = run(folder)
    assert f"2 of {experts} for each token, MLP {width}" in text
    assert (", and a shared one of 40; none in layers 0" in text) == (family == "qwen2_moe")
    assert f"{values['active_parameters']:,} parameters active" in text


def test_model_with_tokenizer(run: Inspect, tiny_hf_folder: Callable[..., Path], tiny_tokenizer_folder: Path) -> None:
    folder = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder)
    assert "307 entries, end of document 305, without chat template" in run(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "with chat template" in run(folder)
    small = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder, vocab_size=300)
    assert "ids up to 306 do not fit the model's rows" in run(small)


def test_model_in_shards_and_in_bin(run: Inspect, tiny_hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    import transformers

    folder = tiny_hf_folder("llama")
    whole = as_json(run(folder, "--json", "--tensors"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shards = as_json(run(tmp_path / "shards", "--json", "--tensors"))
    assert sorted(t["name"] for t in shards["tensor_list"]) == sorted(t["name"] for t in whole["tensor_list"])
    assert shards["parameters"] == whole["parameters"]

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(model.state_dict(), tmp_path / "bin/pytorch_model.bin")
    assert as_json(run(tmp_path / "bin", "--json"))["parameters"] == whole["parameters"]

    sorted((tmp_path / "shards").glob("*.safetensors"))[0].unlink()
    with pytest.raises(TesselError, match="lacks 1 of the .* model-00001-of-.* Download them too"):
        run(tmp_path / "shards")
    (tmp_path / "bin/pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(TesselError, match="pytorch_model.bin is not a whole file"):
        run(tmp_path / "bin")


def test_model_without_weights(run: Inspect, tiny_hf_folder: Callable[..., Path]) -> None:
    folder = tiny_hf_folder("qwen3")
    parameters = as_json(run(folder, "--json"))["parameters"]
    (folder / "model.safetensors").unlink()
    values = as_json(run(folder, "--json"))
    assert (values["parameters"], values["weights"]) == (parameters, False)
    assert "by config.json; there are no weights here" in run(folder)


def test_model_whose_tensors_are_others(run: Inspect, tiny_hf_folder: Callable[..., Path]) -> None:
    folder = tiny_hf_folder("qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    assert "surplus" in run(folder)
    surplus = as_json(run(folder, "--json"))["surplus_tensors"]
    assert surplus and all(name.startswith("model.layers.1.") for name in surplus)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    missing = as_json(run(folder, "--json"))["missing_tensors"]
    assert len(missing) == len(surplus) and "missing" in run(folder)


def test_model_of_another_family(run: Inspect, tmp_path: Path) -> None:
    import transformers

    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)).save_pretrained(
        tmp_path / "gpt2"
    )
    text = run(tmp_path / "gpt2")
    assert "not supported" in text and "gpt2" in text and "None" not in text
    assert as_json(run(tmp_path / "gpt2", "--json"))["parameters"] > 0


def test_single_safetensors_file(run: Inspect, tiny_hf_folder: Callable[..., Path]) -> None:
    folder = tiny_hf_folder("llama")
    values = as_json(run(folder / "model.safetensors", "--json"))
    assert values["kind"] == "safetensors file"
    assert values["parameters"] == as_json(run(folder, "--json"))["parameters"]


def test_tokenizer_alone(run: Inspect, tiny_tokenizer_folder: Path) -> None:
    assert "a tokenizer, without a model" in run(tiny_tokenizer_folder)
    values = as_json(run(tiny_tokenizer_folder, "--json"))
    assert (values["kind"], values["vocab_size"], values["eod"], values["pad"]) == ("tokenizer", 307, 305, 306)


def test_raw_text(run: Inspect, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    assert "raw text" in run(tmp_path / "a.txt")
    assert as_json(run(tmp_path / "a.txt", "--json"))["bytes"] == 3


def make_run(folder: Path) -> Path:
    """The folder of a run with checkpoints at 10 and 20, as `tessel pretrain` leaves it."""
    import torch

    from tessel.checkpoint import training as run_checkpoint

    state = {
        "iteration": 20,
        "consumed_train_samples": 4160,
        "scheduler": {},
        "scaler": {},
        "identity": {},
        "config": {
            "batch": {"seq_length": 256, "train_iters": 30},
            "optimizer": {"lr": 0.001},
            "data": {"data_path": ["1", "a", "2", "b"]},
            "precision": {"bf16": True, "fp16": False},
        },
    }
    for iteration in (10, 20):
        tensors = {"model.x": torch.zeros(2)}
        run_checkpoint.save(folder, iteration, tensors, state, None, lambda path: path.mkdir(), None)
    rows = [
        {"kind": "train", "iteration": 19, "consumed_samples": 1, "lm_loss": 9.0},
        {"kind": "train", "iteration": 20, "consumed_samples": 1, "lm_loss": 3.25},
        {"kind": "validation", "iteration": 20, "consumed_samples": 1, "lm_loss_validation": 3.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text("{}")
    return folder


def test_run(run: Inspect, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    values = as_json(run(folder, "--json"))
    assert (values["kind"], values["iterations"], values["latest_iteration"]) == ("run", [10, 20], 20)
    assert values["last_metrics"]["train"]["lm_loss"] == 3.25
    assert values["last_metrics"]["validation"]["lm_loss_validation"] == 3.5
    assert values["hugging_face_folders"] == [str(folder / "hf")]
    assert values["consumed_train_samples"] == 4160
    text = run(folder)
    assert "10, 20; the next run goes on from 20" in text
    assert "iteration 20: lm_loss 3.25" in text
    assert "--data-path 1 a 2 b --seq-length 256 --train-iters 30 --lr 0.001 --bf16" in text and "fp16" not in text


def test_run_without_checkpoints(run: Inspect, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    values = as_json(run(tmp_path, "--json"))
    assert (values["iterations"], values["latest_iteration"], values["last_metrics"]) == ([], None, {})
    assert "none" in run(tmp_path)


def test_run_that_lacks_its_newest_checkpoint(run: Inspect, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "latest_checkpointed_iteration.txt").write_text("30\n")
    with pytest.raises(TesselError, match="says '30', and there is no such checkpoint"):
        run(folder)


def test_a_path_that_is_nothing(run: Inspect, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(TesselError, match=r"data_text_documents does not exist.*data_text_document"):
        run(tmp_path / "data_text_documents")
    with pytest.raises(TesselError, match=rf"Looked for a Hugging Face model.*It holds {dataset}: is it one of those"):
        run(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TesselError, match=r"is nothing that is known here. Looked for .*tokenizer.json\)\.$"):
        run(tmp_path / "empty")
    (tmp_path / "a.json").write_text("x")
    with pytest.raises(TesselError, match="is a file of no kind that is known here"):
        run(tmp_path / "a.json")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text("{")
    with pytest.raises(TesselError, match="not valid JSON"):
        run(tmp_path / "odd")


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1_500, "1.5 kB"), (2 * 10**12, "2.0 TB")]
)
def test_sizes(number: int, text: str) -> None:
    assert bytes_text(number) == text


@pytest.mark.parametrize(("number", "text"), [(12, "12"), (999_999, "999,999"), (494_032_768, "494,032,768 (494 M)")])
def test_counts(number: int, text: str) -> None:
    assert count_text(number) == text
