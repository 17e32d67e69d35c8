"""Adapters: as peft trains them, on any layout; saved for peft, read from peft and MindSpeed-LLM; merged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tessel.checkpoint.adapters import open_adapter, write_peft
from tessel.cli import main
from tessel.data.indexed import IndexedDatasetWriter
from tessel.errors import TesselError, UsageError
from tessel.generate.engine import load_model
from tessel.layout.adapters import AdapterSpec, groups_of, is_adapter
from tessel.model.config import ModelConfig
from tessel.model.lora import freeze_base
from tessel.model.transformer import Transformer

MakeFolder = Callable[..., Path]
ROWS = {"vocab_size": 307}
SEQ_LENGTH, STEPS = 16, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "text"
    random = np.random.default_rng(5)
    with IndexedDatasetWriter(prefix, np.dtype(np.int32)) as writer:
        for _ in range(40):
            length = int(random.integers(20, 60))
            writer.add_documents(random.integers(0, 306, length).astype(np.int32), np.array([length], np.int32))
    return prefix


def flags(folder: Path, data: Path, save: Path, *more: str) -> list[str]:
    common = f"""pretrain --load {folder} --data-path {data} --seq-length {SEQ_LENGTH} --micro-batch-size 2
        --global-batch-size 4 --train-iters {STEPS} --lr 1e-2 --lr-decay-style constant --weight-decay 0.1
        --tokenizer-type NullTokenizer --vocab-size 306 --save {save} --log-interval 1 --eval-iters 0 --lora-r 4
        --split 100,0,0"""
    return [*common.split(), *more]


def train(folder: Path, data: Path, save: Path, *more: str) -> list[float]:
    """The losses of a run in this process."""
    assert main(flags(folder, data, save, *more)) == 0
    return losses(save)


def train_together(folder: Path, data: Path, save: Path, *more: str) -> list[float]:
    """The losses of a run that starts processes."""
    command = [sys.executable, "-m", "tessel", *flags(folder, data, save, *more)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return losses(save)


def losses(save: Path) -> list[float]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    found = [line["lm_loss"] for line in lines if line["kind"] == "train"]
    assert len(found) >= 2
    return found


def adapter_of(save: Path) -> dict[str, torch.Tensor]:
    return load_file(save / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_trains_as_peft_does(family: str, tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path, capsys: Any) -> None:
    """Losses and adapters of transformers with peft and AdamW, from the same random start."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tiny_hf_folder(family)
    start = tmp_path / "start"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    model.save_pretrained(start)
    ours = train(folder, data, tmp_path / "run", "--lora-load", str(start))

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1
    )
    theirs = []
    for tokens in samples_of(folder, data, tmp_path, capsys):
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=1e-5)
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    for name, tensor in adapter_of(tmp_path / "run").items():
        torch.testing.assert_close(tensor, trained[name].detach(), rtol=0, atol=2e-5)

    reloaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "run" / "adapter"
    )
    tokens = torch.arange(12)[None] * 7
    unmerged, _ = load_model(folder, adapter=tmp_path / "run" / "adapter")
    with torch.no_grad():
        expected = reloaded(tokens).logits
        torch.testing.assert_close(unmerged(tokens), expected, rtol=0, atol=5e-6)
    assert main(["merge", "--lora-load", str(tmp_path / "run"), "--save", str(tmp_path / "merged")]) == 0
    whole, _ = load_model(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens), expected, rtol=0, atol=1e-5)


def samples_of(folder: Path, data: Path, tmp_path: Path, capsys: Any) -> list[torch.Tensor]:
    """The tokens of each step, [4, SEQ_LENGTH + 1], as `tessel samples` shows them."""
    capsys.readouterr()
    run = flags(folder, data, tmp_path / "run")[1:]
    assert main(["samples", *run, "--step", f"1:{STEPS + 1}", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    tokens = [[*row["tokens"], row["labels"][-1]] for row in rows]
    return list(torch.tensor(tokens).split(4))


LAYOUTS = {
    "TP2 PP2": "--nproc-per-node 4 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    "TP4 SP (copies of key/value heads)": "--nproc-per-node 4 --tensor-model-parallel-size 4 --sequence-parallel",
    "FSDP2 CP2": "--nproc-per-node 4 --context-parallel-size 2",
}


@pytest.mark.parametrize(
    ("layout", "targets"),
    [
        ("TP2 PP2", "all"),
        ("TP4 SP (copies of key/value heads)", "linear_qkv linear_proj linear_fc1"),
        ("FSDP2 CP2", "linear_qkv dense_4h_to_h"),
    ],
)
def test_every_layout_trains_the_same(
    layout: str, targets: str, tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path
) -> None:
    folder = tiny_hf_folder("qwen2")
    more = ["--lora-target-modules", *targets.split()]
    alone = train(folder, data, tmp_path / "one", *more)
    many = train_together(folder, data, tmp_path / "many", *more, *LAYOUTS[layout].split())
    assert many == pytest.approx(alone, rel=1e-5)
    whole = adapter_of(tmp_path / "one")
    for name, tensor in adapter_of(tmp_path / "many").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_a_resumed_run_is_the_unbroken_one(
    precision: list[str], tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path
) -> None:
    folder = tiny_hf_folder("qwen2")
    more = ["--lora-dropout", "0.1", "--save-interval", "2", *precision]
    unbroken = train(folder, data, tmp_path / "one", *more)
    train(folder, data, tmp_path / "two", *more, "--exit-interval", "2")
    assert train(folder, data, tmp_path / "two", *more)[-STEPS:] == unbroken
    first, second = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    checkpoint = json.loads((tmp_path / "two" / "iter_0000002" / "run.json").read_text())
    assert checkpoint["identity"]["model"]["adapters"]["rank"] == 4
    from torch.distributed.checkpoint import FileSystemReader

    held = FileSystemReader(tmp_path / "two" / "iter_0000002").read_metadata().state_dict_metadata
    assert held and all(".lora." in name for name in held), "the frozen model is not saved again"


def test_the_frozen_model_is_held_in_what_is_computed_in(tiny_hf_folder: MakeFolder) -> None:
    config = ModelConfig.from_folder(tiny_hf_folder("qwen2"))
    with torch.device("meta"):
        model = Transformer(replace(config, adapters=AdapterSpec(3, 5.0, groups_of(["all"]))))
    freeze_base(model, torch.bfloat16)
    held: dict[bool, set[Any]] = {True: set(), False: set()}
    for name, parameter in model.named_parameters():
        held[is_adapter(name)].add((parameter.dtype, parameter.requires_grad))
    assert held == {True: {(torch.float32, True)}, False: {(torch.bfloat16, False)}}


def test_another_scale_is_another_run(tiny_hf_folder: MakeFolder, data: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tiny_hf_folder("qwen2")
    train(folder, data, tmp_path / "run")
    assert main(flags(folder, data, tmp_path / "run", "--lora-alpha", "3")) == 1
    assert "model: adapters was" in capsys.readouterr().err


def test_names_of_every_suite() -> None:
    assert groups_of(["query_key_value", "dense"]) == groups_of(["linear_qkv", "linear_proj"])
    assert groups_of(["linear_qkv"]) == (("q_proj", "k_proj", "v_proj"),)
    assert groups_of(["v_proj", "q_proj"]) == (("q_proj",), ("v_proj",))
    assert len(groups_of(["all-linear"])) == 7
    for names, match in (
        (["q_prj"], "nearest: .*q_proj"),
        (["linear_qkv", "k_proj"], "names k_proj twice"),
        ([], "is empty"),
    ):
        with pytest.raises(UsageError, match=match):
            groups_of(names)


def random_adapter(config: ModelConfig, spec: AdapterSpec) -> dict[str, torch.Tensor]:
    from tessel.layout.sharding import parameters

    torch.manual_seed(1)
    rows = parameters(replace(config, adapters=spec))
    return {name: torch.randn(rule.shape) for name, rule in rows.items() if is_adapter(name)}


def test_shared_a_is_copied_for_peft_and_changes_nothing(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    folder = tiny_hf_folder("qwen2")
    config = ModelConfig.from_folder(folder)
    spec = AdapterSpec(3, 5.0, groups_of(["linear_qkv", "linear_fc1"]))
    write_peft(tmp_path / "adapter", iter(random_adapter(config, spec).items()), spec, str(folder))
    again = open_adapter(tmp_path / "adapter", config)
    assert again.spec == AdapterSpec(3, 5.0, groups_of(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]))
    prefix = "model.layers.0.self_attn."
    assert torch.equal(again.tensors[f"{prefix}k_proj.lora.A"], again.tensors[f"{prefix}q_proj.lora.A"])
    assert not torch.equal(again.tensors[f"{prefix}k_proj.lora.B"], again.tensors[f"{prefix}v_proj.lora.B"])


def test_an_adapter_of_another_model_is_refused_by_names(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    folder = tiny_hf_folder("qwen2")
    config = ModelConfig.from_folder(folder)
    spec = AdapterSpec(3, 5.0, groups_of(["q_proj"]))
    tensors = random_adapter(config, spec)
    tensors["model.layers.0.self_attn.q_proj.lora.A"] = torch.zeros(3, 5)
    write_peft(tmp_path / "wrong", iter(tensors.items()), spec, "elsewhere")
    with pytest.raises(TesselError, match=r"trained beside elsewhere.*q_proj.lora.A is \(3, 5\) and should be"):
        open_adapter(tmp_path / "wrong", config)
    with pytest.raises(TesselError, match="holds no adapter|has no latest_checkpointed"):
        open_adapter(folder, config)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, "missing: .*q_proj.lora.magnitude"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": 0}, "r is 0"),
        ({"peft_type": "IA3"}, "does not describe a LoRA"),
    ],
)
def test_settings_that_change_what_is_computed_are_refused(
    changes: dict[str, Any], match: str, tiny_hf_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = tiny_hf_folder("qwen2")
    config = ModelConfig.from_folder(folder)
    spec = AdapterSpec(3, 5.0, groups_of(["q_proj"]))
    write_peft(tmp_path / "adapter", iter(random_adapter(config, spec).items()), spec, None)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(TesselError, match=match):
        open_adapter(tmp_path / "adapter", config)


def test_flags_that_contradict_the_stored_adapter(tiny_hf_folder: MakeFolder, tmp_path: Path, capsys: Any) -> None:
    folder = tiny_hf_folder("qwen2")
    spec = AdapterSpec(3, 5.0, groups_of(["q_proj"]))
    write_peft(tmp_path / "a", iter(random_adapter(ModelConfig.from_folder(folder), spec).items()), spec, str(folder))
    command = ["merge", "--lora-load", str(tmp_path / "a"), "--save", str(tmp_path / "m")]
    for more in (["--lora-r", "8"], ["--lora-alpha", "16"], ["--lora-target-modules", "linear_qkv"]):
        assert main([*command, *more]) == 2
        assert re.search(r"holds another adapter than .*stored: ", capsys.readouterr().err)
    assert main([*command, "--lora-r", "3", "--lora-alpha", "5", "--lora-target-modules", "q_proj"]) == 0


def megatron_files(root: Path, tensors: dict[tuple[int, int], dict[str, torch.Tensor]]) -> None:
    import argparse

    for (tp, pp), model in tensors.items():
        path = root / "iter_0000001" / (f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if max(p for _, p in tensors) else ""))
        path.mkdir(parents=True)
        args = argparse.Namespace(lora_r=2, lora_alpha=4)
        torch.save({"model": model, "args": args, "iteration": 1}, path / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("1")


def test_ranks_and_stages_of_mindspeed_are_put_together(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    """Two tensor-parallel ranks of two stages say the same as one file of the whole."""
    config = ModelConfig.from_folder(tiny_hf_folder("qwen2", num_key_value_heads=2, num_attention_heads=4))
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    torch.manual_seed(2)
    rows = 2 * (2 + 2) * head
    whole: dict[str, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"decoder.layers.{layer}."
        for name, out, into in (
            ("self_attention.linear_qkv", rows, hidden),
            ("self_attention.linear_proj", hidden, 4 * head),
            ("mlp.linear_fc1", 2 * inner, hidden),
            ("mlp.linear_fc2", hidden, inner),
        ):
            whole[f"{prefix}{name}.lora_A.default.weight"] = torch.randn(2, into)
            whole[f"{prefix}{name}.lora_B.default.weight"] = torch.randn(out, 2)
    megatron_files(tmp_path / "one", {(0, 0): whole})

    def part(key: str, tensor: torch.Tensor, tp: int) -> torch.Tensor:
        if "fc1.lora_B" in key:
            return torch.cat([half.chunk(2)[tp] for half in tensor.chunk(2)])
        if "qkv.lora_B" in key:
            return tensor.chunk(2)[tp]
        return tensor.chunk(2, dim=1)[tp] if "proj.lora_A" in key or "fc2.lora_A" in key else tensor

    half = config.num_hidden_layers // 2
    cut: dict[tuple[int, int], dict[str, torch.Tensor]] = {(tp, pp): {} for tp in range(2) for pp in range(2)}
    for key, tensor in whole.items():
        layer = int(key.split(".")[2])
        local = key.replace(f"layers.{layer}.", f"layers.{layer % half}.")
        for tp in range(2):
            cut[tp, layer // half][local] = part(key, tensor, tp).clone()
    megatron_files(tmp_path / "four", cut)
    one, four = open_adapter(tmp_path / "one", config), open_adapter(tmp_path / "four", config)
    assert (
        one.spec
        == four.spec
        == AdapterSpec(2, 4.0, groups_of(["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]))
    )
    assert one.tensors.keys() == four.tensors.keys()
    assert all(torch.equal(one.tensors[name], four.tensors[name]) for name in one.tensors)
