"""Hugging Face folders there and back: against transformers, and against everything that can be wrong with one."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessel.checkpoint import huggingface, safetensors
from tessel.checkpoint.metadata import read_side_files, write_metadata
from tessel.checkpoint.weights import read_bin, read_tensors
from tessel.errors import TesselError
from tessel.model.config import ModelConfig
from tessel.model.transformer import Transformer

MakeFolder = Callable[..., Path]
FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
CASES = [(family, tied) for family in FAMILIES for tied in (False, True)]


def build(folder: Path) -> Transformer:
    """The model of a folder with its weights."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_folder(folder))
    huggingface.load_into(model, folder)
    return model


def of_transformers(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def some_tokens() -> Tensor:
    return torch.randint(0, 307, (2, 17), generator=torch.Generator().manual_seed(5))


def parameters(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a folder's model.safetensors."""
    path = folder / "model.safetensors"
    tensors = {name: info.read().clone() for name, info in safetensors.read_header(path).items()}
    change(tensors)
    safetensors.write_file(path, list(tensors.items()), torch.float32)


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_what_transformers_saves_is_read(family: str, tied: bool, tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder(family, tie_word_embeddings=tied)
    model, reference = build(folder), of_transformers(folder)
    theirs = dict(reference.named_parameters())
    assert {name for name, _ in parameters(model)} == theirs.keys()
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in parameters(model))
    assert (model.lm_head is None) == tied
    with torch.no_grad():
        torch.testing.assert_close(model(some_tokens()), reference(some_tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["sharded safetensors", "bin", "sharded bin"])
def test_every_way_of_storing_gives_the_same_weights(form: str, tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen2")
    model = build(folder)
    if form == "sharded safetensors":
        of_transformers(folder).save_pretrained(folder, max_shard_size="20KB")
        (folder / "model.safetensors").unlink(missing_ok=True)
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    else:
        (folder / "model.safetensors").unlink()
        write_bins(folder, dict(parameters(model)), 3 if form == "sharded bin" else 1)
    again = dict(parameters(build(folder)))
    assert again.keys() == dict(parameters(model)).keys()
    assert all(torch.equal(again[name], parameter) for name, parameter in parameters(model))


def write_bins(folder: Path, tensors: dict[str, Tensor], num_files: int) -> None:
    names = list(tensors)
    if num_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    file_of = {}
    for number in range(num_files):
        file_name = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        part = names[number::num_files]
        torch.save({name: tensors[name] for name in part}, folder / file_name)
        file_of |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": file_of}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_a_bin_from_before_zip_archives_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(5.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_bin(tmp_path / "old.bin")["a"].read(), torch.arange(5.0))


def test_parameters_in_place_keep_their_dtype_and_their_memory(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("llama")
    model = Transformer(ModelConfig.from_folder(folder)).to(torch.bfloat16)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    huggingface.load_into(model, folder)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    reference = dict(of_transformers(folder).named_parameters())
    for name, parameter in parameters(model):
        assert torch.equal(parameter, reference[name].bfloat16())


def test_loaded_weights_are_not_tied_to_the_file(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("llama")
    before = (folder / "model.safetensors").read_bytes()
    model = build(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    mapped = read_tensors(folder)["lm_head.weight"].read()
    mapped.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
def test_stored_dtypes_are_converted(stored: torch.dtype, tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("mistral")
    model = build(folder)
    safetensors.write_file(folder / "model.safetensors", parameters(model), stored)
    for name, parameter in parameters(build(folder)):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, dict(parameters(model))[name].to(stored).float())


def test_elements_at_odd_addresses_are_read(tmp_path: Path) -> None:
    values = torch.randn(7)
    header = json.dumps({"a": {"dtype": "F32", "shape": [7], "data_offsets": [0, 28]}}).encode()
    header += b" " * (3 - len(header) % 4 + 4)  # a data section that begins off every multiple of 4
    assert len(header) % 4
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.numpy().tobytes())
    assert torch.equal(safetensors.read_header(path)["a"].read(), values)


def test_written_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {
        "é": torch.randn(3, 5),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "t": torch.randn(4, 3).T,
    }
    safetensors.write_file(tmp_path / "ours.safetensors", list(tensors.items()), torch.bfloat16)
    theirs = load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[name], tensor.bfloat16()) for name, tensor in tensors.items())
    mixed = {"a": torch.arange(6).view(2, 3), "b": torch.tensor([True, False]), "c": torch.randn(3).half()}
    save_file(mixed, tmp_path / "theirs.safetensors")
    ours = safetensors.read_header(tmp_path / "theirs.safetensors")
    assert all(torch.equal(ours[name].read(), tensor) for name, tensor in mixed.items())


def test_a_large_tensor_is_converted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "_WRITE_CHUNK_ELEMENTS", 10)
    tensor = torch.randn(7, 9)
    assert [len(chunk) for chunk in safetensors._chunks(tensor, torch.float16)] == [20] * 6 + [6]
    safetensors.write_file(tmp_path / "a.safetensors", [("a", tensor)], torch.float16)
    assert torch.equal(safetensors.read_header(tmp_path / "a.safetensors")["a"].read(), tensor.half())


_MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tessel.checkpoint import huggingface
from tessel.checkpoint.weights import read_tensors
from tessel.model.config import ModelConfig
from tessel.model.transformer import Transformer
from tessel.runtime.memory import resident_bytes

what, folder = sys.argv[1], Path(sys.argv[2])
peak, stop = 0, threading.Event()

def sample():
    global peak
    while not stop.is_set():
        peak = max(peak, resident_bytes())
        time.sleep(0.001)

with torch.device("meta"):
    model = Transformer(ModelConfig.from_folder(folder))
if what == "export":
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
before = resident_bytes()
thread = threading.Thread(target=sample)
thread.start()
if what == "load":
    huggingface.load_into(model, folder)
else:
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    huggingface.export(tensors, model.config, folder / "out", torch.bfloat16)
stop.set()
thread.join()
print(max(peak, resident_bytes()) - before, sum(p.nbytes for p in model.parameters()))
"""


def measure(what: str, folder: Path, repository: Path) -> tuple[int, int]:
    """(growth of private memory at its peak, bytes of the model) in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, what, str(folder)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    grown, model_bytes = done.stdout.split()
    return int(grown), int(model_bytes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is told by Linux alone")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_neither_reading_nor_writing_takes_a_second_copy(form: str, tmp_path: Path, repository: Path) -> None:
    config = ModelConfig("llama", 8000, 1024, 2816, 3, 8, 8, 128)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    if form == "bin":
        write_metadata(tmp_path, config, torch.float32)
        write_bins(tmp_path, dict(parameters(model)), 2)
    else:
        huggingface.export(parameters(model), config, tmp_path, torch.float32, max_shard_bytes=100_000_000)
    grown, model_bytes = measure("load", tmp_path, repository)
    assert model_bytes > 200e6
    # The model itself, and no copy of a shard (100 MB) or of the file beside it.
    assert 0.9 * model_bytes < grown < model_bytes + 50e6
    if form == "safetensors":
        grown, _ = measure("export", tmp_path, repository)
        assert grown < 80e6  # pieces of 16M elements, where a copy would be 107 MB or more


# ------------------------------------------------------------------------------------------ errors


def test_no_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TesselError, match=r"no weights: looked for model\.safetensors, .*pytorch_model\.bin"):
        read_tensors(tmp_path)
    with pytest.raises(TesselError, match="does not exist"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(TesselError, match="is a file"):
        read_tensors(tmp_path / "config.json")


def test_shards_without_index_and_adapters_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(TesselError, match="It is an adapter"):
        read_tensors(tmp_path)
    (tmp_path / "consolidated.safetensors").touch()
    with pytest.raises(TesselError, match=r"consolidated\.safetensors, which is not a name"):
        read_tensors(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(TesselError, match=r"without their index: download model\.safetensors\.index\.json"):
        read_tensors(tmp_path)


def test_truncated_safetensors(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen2")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(TesselError, match=rf"truncated: it has {len(whole) - 1:,} bytes of the {len(whole):,}"):
        build(folder)
    path.write_bytes(whole[:100])
    with pytest.raises(TesselError, match="the file ends after 100"):
        build(folder)
    path.write_bytes(whole[:5])
    with pytest.raises(TesselError, match="fewer than the 8"):
        build(folder)
    path.write_bytes(b"")
    with pytest.raises(TesselError, match="is empty"):
        build(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": 3}', "entry of a is not one of a tensor"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "entry of a is not one of a tensor"),
        (b'{"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}', "dtype 'F33', which is not known"),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', "not whole numbers"),
        (b'{"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}', "not whole numbers"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}', "not whole numbers"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "cannot have 8 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', "truncated"),
        (b'{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}', "which is not known"),
    ],
)
def test_damaged_header(header: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(TesselError, match=message):
        read_tensors(tmp_path)


def test_a_header_of_impossible_size_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + bytes(100))
    with pytest.raises(TesselError, match="first 8 bytes give a header of"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "web page.*/resolve/"),
        (b"<html><body>not found</body></html>", "web page"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_other_things_saved_under_the_name_of_weights(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TesselError, match=message):
        read_tensors(tmp_path)


def shard(folder: Path) -> list[Path]:
    model = build(folder)
    (folder / "model.safetensors").unlink()
    write_bins(folder, dict(parameters(model)), 3)
    return sorted(folder.glob("pytorch_model-*.bin"))


def test_missing_shards_are_named(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen2")
    shards = shard(folder)
    shards[1].unlink()
    with pytest.raises(TesselError, match=r"lacks 1 of the 3 shards .*: pytorch_model-00002-of-00003\.bin\."):
        build(folder)


def test_an_index_that_promises_too_much(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen2")
    shards = shard(folder)
    tensors = torch.load(shards[0])
    first = next(iter(tensors))
    torch.save({name: value for name, value in tensors.items() if name != first}, shards[0])
    with pytest.raises(TesselError, match=rf"promises tensors .*{first} \(in pytorch_model-00001"):
        build(folder)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "sub\\outside.bin", "..", "", 7, None])
def test_an_index_cannot_leave_its_folder(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / "outside.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(TesselError, match="not the name of a file in that folder"):
        read_tensors(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_damaged_index(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(TesselError, match=r"index\.json.* Download the file again"):
        read_tensors(tmp_path)


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_bin_that_asks_for_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    torch.save({"a": _Hostile(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TesselError, match="nothing of it was run"):
        read_tensors(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_damaged_bin(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(TesselError, match=r"pytorch_model\.bin is not a whole file"):
        read_tensors(tmp_path)
    path.write_bytes(b"some text that is no pickle")
    with pytest.raises(TesselError, match=r"pytorch_model\.bin"):
        read_tensors(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "step": 3}, path)
    with pytest.raises(TesselError, match="these are none: model, step"):
        read_tensors(tmp_path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(TesselError, match="its top level"):
        read_tensors(tmp_path)


def test_missing_surplus_and_misshapen_tensors_are_all_named(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen3")

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(56, 31)

    rewrite(folder, change)
    with pytest.raises(TesselError) as caught:
        build(folder)
    message = str(caught.value)
    assert "1 missing: model.norm.weight;" in message
    assert "1 surplus: model.layers.7.mlp.up_proj.weight;" in message
    assert "model.layers.0.mlp.up_proj.weight is (56, 31) and should be (56, 32)" in message


def test_only_ten_of_many_names_are_shown(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("llama")
    rewrite(folder, lambda tensors: tensors.update({f"extra.{number:02d}": torch.zeros(1) for number in range(13)}))
    with pytest.raises(TesselError, match=r"13 surplus: extra\.00, .*extra\.09 and 3 more\."):
        build(folder)


def test_a_refused_folder_leaves_the_model_as_it_was(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("llama")
    model = build(folder)
    before = {name: parameter.clone() for name, parameter in parameters(model)}
    rewrite(
        folder, lambda tensors: tensors.update({name: tensor + 1 for name, tensor in tensors.items()}, x=torch.ones(1))
    )
    with pytest.raises(TesselError, match="surplus: x"):
        huggingface.load_into(model, folder)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters(model))


def test_integer_and_quantised_tensors_are_refused(tiny_hf_folder: MakeFolder) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_hf_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for wrong in (torch.int8, torch.float8_e4m3fn):
        save_file(tensors | {name: torch.zeros(56, 32).to(wrong)}, folder / "model.safetensors")
        with pytest.raises(TesselError, match=rf"quantised .*{name} is {str(wrong)[6:]}"):
            build(folder)


def test_rotary_buffers_of_old_files_are_passed_over(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("llama")
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    build(folder)


def test_a_tied_model_may_store_its_head_too(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen2", tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    reference = dict(parameters(build(folder)))[embedding].clone()
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    assert torch.equal(dict(parameters(build(folder)))[embedding], reference)
    rewrite(folder, lambda tensors: tensors.pop(embedding))
    assert torch.equal(dict(parameters(build(folder)))[embedding], reference)
    rewrite(folder, lambda tensors: tensors.update({embedding: tensors["lm_head.weight"] + 1}))
    with pytest.raises(TesselError, match=r"tie_word_embeddings: true, but lm_head\.weight differs"):
        build(folder)


def test_an_untied_model_without_head(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen2", tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(TesselError, match=r'no lm_head\.weight.*write "tie_word_embeddings": true'):
        build(folder)


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_transformers_opens_what_is_exported(
    family: str, tied: bool, tiny_hf_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = tiny_hf_folder(family, tie_word_embeddings=tied)
    model = build(folder)
    out = tmp_path / "out"
    huggingface.export(parameters(model), model.config, out, torch.float32, max_shard_bytes=30_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
    reference, again = of_transformers(folder), of_transformers(out)
    with torch.no_grad():
        assert torch.equal(again(some_tokens()).logits, reference(some_tokens()).logits)
    assert all(torch.equal(p, dict(parameters(model))[name]) for name, p in parameters(build(out)))


def test_export_converts_and_says_so(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = build(tiny_hf_folder("qwen2"))
    huggingface.export(parameters(model), model.config, tmp_path / "out", torch.bfloat16)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, dict(parameters(model))[name].bfloat16())


def test_shards_hold_at_most_what_they_may_and_are_built_one_at_a_time() -> None:
    made: list[int] = []

    def tensors() -> Any:
        for number in range(6):
            made.append(number)
            yield f"t{number}", torch.zeros(10 if number != 2 else 100)

    shards = huggingface._shards(tensors(), torch.float32, 80)
    assert [name for name, _ in next(shards)] == ["t0", "t1"]
    assert made == [0, 1, 2]
    assert [[name for name, _ in shard] for shard in shards] == [["t2"], ["t3", "t4"], ["t5"]]


def test_tokenizer_template_and_generation_config_come_along(
    tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [305, 4], "temperature": 0.6, "do_sample": true}')
    (folder / "modeling_private.py").write_text("raise SystemExit")
    (folder / "notes.txt").write_text("mine")
    model = build(folder)
    out = tmp_path / "out"
    huggingface.export(parameters(model), model.config, out, torch.float32, read_side_files(folder))
    assert (out / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
    assert not (out / "modeling_private.py").exists() and not (out / "notes.txt").exists()
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(folder)
    assert ours("the quick brown fox").input_ids == theirs("the quick brown fox").input_ids
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_generation_config_is_made_where_there_is_none(
    tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    config = ModelConfig.from_folder(tiny_hf_folder("llama", bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0))
    write_metadata(tmp_path / "from_config", config, torch.float32, read_side_files(tiny_tokenizer_folder))
    made = GenerationConfig.from_pretrained(tmp_path / "from_config")
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (1, [2, 3], 0)
    bare = ModelConfig.from_folder(tiny_hf_folder("llama"))
    write_metadata(tmp_path / "from_tokenizer", bare, torch.float32, read_side_files(tiny_tokenizer_folder))
    made = GenerationConfig.from_pretrained(tmp_path / "from_tokenizer")
    assert made.eos_token_id == AutoTokenizer.from_pretrained(tiny_tokenizer_folder).eos_token_id
    write_metadata(tmp_path / "from_nothing", bare, torch.float32)
    assert GenerationConfig.from_pretrained(tmp_path / "from_nothing").eos_token_id is None


def test_a_tokenizer_of_one_file(tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = ModelConfig.from_folder(tiny_hf_folder("llama"))
    write_metadata(
        tmp_path / "beside", config, torch.float32, read_side_files(tiny_tokenizer_folder / "tokenizer.json")
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "beside").eos_token == "<|endoftext|>"
    alone = tmp_path / "mine.json"
    alone.write_bytes((tiny_tokenizer_folder / "tokenizer.json").read_bytes())
    write_metadata(tmp_path / "alone", config, torch.float32, read_side_files(alone))
    ids = AutoTokenizer.from_pretrained(tmp_path / "alone")("the lazy dog").input_ids
    assert ids == AutoTokenizer.from_pretrained(tiny_tokenizer_folder)("the lazy dog").input_ids


def test_code_that_is_not_copied_is_not_named(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    folder = tiny_hf_folder("llama")
    raw = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.Y"}, "my_key": 5}
    write_metadata(tmp_path / "out", ModelConfig.from_hf(raw), torch.float32)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in written and written["my_key"] == 5


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(
    tiny_hf_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_hf_folder("qwen2"))
    out = tmp_path / "run" / "hf"
    huggingface.export(parameters(model), model.config, out, torch.float32)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    pieces = safetensors._chunks
    written: list[int] = []

    def fill_up(tensor: Tensor, dtype: torch.dtype) -> Any:
        written.append(tensor.numel())
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pieces(tensor, dtype)

    monkeypatch.setattr(safetensors, "_chunks", fill_up)
    for target in (out, tmp_path / "run" / "new"):
        written.clear()
        with pytest.raises(TesselError, match="disk is full"):
            huggingface.export(parameters(model), model.config, target, torch.float32)
        assert len(written) == 5
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["hf"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    monkeypatch.undo()
    huggingface.export(parameters(model), model.config, out, torch.float32)
    assert torch.equal(dict(parameters(build(out)))["model.norm.weight"], model.model.norm.weight)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["hf"]


def test_a_folder_of_something_else_is_not_replaced(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    model = build(tiny_hf_folder("qwen2"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for target in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(TesselError, match="is no Hugging Face folder, so it is not replaced"):
            huggingface.export(parameters(model), model.config, target, torch.float32)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_run_that_goes_on_keeps_its_tokenizer_when_old_checkpoints_go(
    tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    from tessel.cli import main
    from tests.train.runs import NULL_TOKENIZER, loading, write_data

    folder = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [305, 4]}')
    save = tmp_path / "save"
    arguments = loading(folder, write_data(tmp_path / "data"), save, 6, "--save-interval", "2", "--keep-last-k", "1")
    arguments = [argument for argument in arguments if argument not in NULL_TOKENIZER]
    assert main([*arguments, "--exit-interval", "2"]) == 0
    assert main(arguments) == 0
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000006"]
    assert (save / "hf" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((save / "hf" / "generation_config.json").read_text()) == {"eos_token_id": [305, 4]}
