"""Pai-Megatron-Patch's scripts: each argument is checked by its name, and becomes flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.cli import main
from tessel.config.convert import CONVERSION, ConvertConfig
from tessel.config.megatron import MEGATRON
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.config.validate import validate
from tessel.drop_in import pai
from tessel.drop_in.pai import QWEN3, QWEN25
from tessel.drop_in.translate import translate
from tessel.errors import UsageError

WRONG = {
    "ENV": "local",
    "MODEL_SIZE": "8B",
    "BATCH_SIZE": "0",
    "GLOBAL_BATCH_SIZE": "eight",
    "LR": "fast",
    "MIN_LR": "-1",
    "SEQ_LEN": "1k",
    "PAD_LEN": "",
    "PR": "fp8",
    "TP": "0",
    "PP": "x",
    "CP": "1.5",
    "SP": "yes",
    "DO": "1",
    "FL": "on",
    "SFT": "maybe",
    "AC": "all",
    "OPTIMIZER_OFFLOAD": "auto",
    "SAVE_INTERVAL": "never",
    "DATASET_PATH": "/nowhere/data",
    "VALID_DATASET_PATH": "/nowhere/valid",
    "PRETRAIN_CHECKPOINT_PATH": "/nowhere/model",
    "TRAIN_TOKENS_OR_ITERS": "10e3",
    "WARMUP_TOKENS_OR_ITERS": "-1",
    "OUTPUT_BASEPATH": "",
}


@pytest.fixture
def guide(tmp_path: Path, tiny_hf_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The 25 arguments of the guide's pretraining, on a tiny model."""
    monkeypatch.setattr(pai, "device_count", lambda: 0)
    for name in ("MP_DATASET_TYPE", "MP_AC_LAYERS", "MP_VP", "MP_SFT_PACKING", "MP_PP0_LAYERS", "MODEL_PARALLEL_ARGS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "wudao_text_document.idx").touch()
    data = str(tmp_path / "wudao_text_document")
    values = "dsw 0.5B 1 8 1e-5 1e-6 128 128 bf16 1 1 1 true true true false false false 100000".split()
    values += [data, data, str(tiny_hf_folder("qwen2")), "10000", "100", str(tmp_path / "out")]
    return dict(zip((one.name for one in QWEN25), values, strict=True))


def flags(script: str, given: dict[str, str]) -> tuple[RunConfig, str]:
    """What a script's arguments become, and the remarks."""
    done = translate("pai", script, list(given.values()))
    (command,) = done.commands
    assert command.verb == "pretrain"
    return validate(parse(RunConfig, command.arguments.argv, "x", MEGATRON).value), " ".join(done.remarks)


def test_the_guides_pretraining(guide: dict[str, str]) -> None:
    cfg, said = flags("run_mcore_qwen.sh", guide)
    assert (cfg.batch.train_iters, cfg.schedule.lr_warmup_iters, cfg.batch.seq_length) == (9, 0, 128)
    assert cfg.checkpoint.load == guide["PRETRAIN_CHECKPOINT_PATH"]
    assert cfg.checkpoint.ckpt_format == ("torch_dist",)
    assert cfg.checkpoint.save is not None
    assert "/out/checkpoint/pretrain-mcore-qwen2.5-0.5B-lr-1e-5-" in cfg.checkpoint.save
    assert cfg.layout.use_distributed_optimizer and not cfg.layout.sequence_parallel
    assert cfg.launch.nproc_per_node == 1
    assert "MODEL_SIZE 0.5B and" in said
    assert "(layers 24 and 2, hidden size 896 and 32): config.json counts" in said


def test_25_wrong_arguments_are_25_clear_messages(guide: dict[str, str]) -> None:
    assert list(WRONG) == [one.name for one in QWEN25]
    messages = set()
    for number, (name, wrong) in enumerate(WRONG.items(), 1):
        with pytest.raises(UsageError) as caught:
            flags("run_mcore_qwen.sh", guide | {name: wrong})
        assert str(caught.value).startswith(f"run_mcore_qwen.sh: argument {number}, {name}, is {wrong!r}: ")
        messages.add(str(caught.value))
    assert len(messages) == 25
    assert any("fp8 is not supported yet: use bf16" in message for message in messages)


def test_a_wrong_number_of_arguments_is_shown_with_what_was_given(guide: dict[str, str]) -> None:
    with pytest.raises(
        UsageError, match=r"needs 25 arguments, and 2 are given: 1. ENV = 'dsw', 2. MODEL_SIZE = '0.5B'"
    ):
        translate("pai", "run_mcore_qwen.sh", ["dsw", "0.5B"])
    with pytest.raises(UsageError, match="too many: more"):
        translate("pai", "run_mcore_qwen.sh", [*guide.values(), "more"])


def test_what_arguments_say_together(guide: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="10 tokens are less than one iteration of 8 x 128"):
        flags("run_mcore_qwen.sh", guide | {"TRAIN_TOKENS_OR_ITERS": "10"})
    with pytest.raises(
        UsageError, match="WARMUP_TOKENS_OR_ITERS 6 is 6 iterations, and the learning rate decays over 4"
    ):
        flags(
            "run_mcore_qwen.sh", guide | {"SFT": "true", "TRAIN_TOKENS_OR_ITERS": "10", "WARMUP_TOKENS_OR_ITERS": "6"}
        )
    monkeypatch.setattr(pai, "device_count", lambda: 3)
    with pytest.raises(UsageError, match="TP 2 x PP 1 x CP 1 is 2, which does not divide the 3 processes"):
        flags("run_mcore_qwen.sh", guide | {"TP": "2"})


def test_fine_tuning_counts_iterations(guide: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, _ = flags("run_mcore_qwen.sh", guide | {"SFT": "true"})
    assert (cfg.batch.train_iters, cfg.schedule.lr_warmup_iters, cfg.schedule.lr_decay_iters) == (10000, 100, 9900)
    assert (cfg.finetune.dataset, cfg.finetune.train_mode) == ("MMAP", "finetune")
    monkeypatch.setenv("MP_DATASET_TYPE", "raw")
    cfg, _ = flags("run_mcore_qwen.sh", guide | {"SFT": "true"})
    assert (cfg.finetune.dataset, cfg.finetune.max_padding_length) == ("JSON-SFT", 128)
    with pytest.raises(UsageError, match="set SFT to true"):
        flags("run_mcore_qwen.sh", guide)


def test_memory_and_layout(guide: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MP_AC_LAYERS", "2")
    changes = {"AC": "full", "TP": "2", "PP": "2", "OPTIMIZER_OFFLOAD": "static", "FL": "false"}
    cfg, _ = flags("run_mcore_qwen.sh", guide | changes)
    assert (cfg.kernels.recompute_granularity, cfg.kernels.recompute_num_layers) == ("full", 2)
    assert cfg.layout.sequence_parallel and cfg.memory.optimizer_cpu_offload
    assert (cfg.launch.nproc_per_node, cfg.kernels.attention_backend) == (4, "fused")


def test_several_machines(guide: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "KUBERNETES_CONTAINER_RESOURCE_GPU", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="ENV is dlc, and WORLD_SIZE, RANK, KUBERNETES_CONTAINER_RESOURCE_GPU, MASTER"):
        flags("run_mcore_qwen.sh", guide | {"ENV": "dlc"})
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "KUBERNETES_CONTAINER_RESOURCE_GPU": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    cfg, _ = flags("run_mcore_qwen.sh", guide | {"ENV": "dlc"})
    launch = cfg.launch
    assert (launch.nnodes, launch.node_rank, launch.nproc_per_node, launch.master_addr) == ("2", 1, 4, "10.0.0.1")


def test_qwen3_has_two_more(guide: dict[str, str]) -> None:
    values = {one.name: {"ETP": "1", "EP": "1"}.get(one.name, guide.get(one.name, "")) for one in QWEN3}
    cfg, _ = flags("run_mcore_qwen3.sh", values | {"MODEL_SIZE": "A3B"})
    assert cfg.experts.moe_aux_loss_coeff == 0.001


def test_a_norm_or_a_rotary_base_that_differs_is_said(
    guide: dict[str, str], tiny_hf_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_hf_folder("qwen2", rms_norm_eps=1e-5, rope_theta=10000.0)
    mg = str(tmp_path / "mg")
    assert main(["convert", "--load", str(model), "--save", mg, "--to", "torch_dist"]) == 0
    _, said = flags("run_mcore_qwen.sh", guide | {"PRETRAIN_CHECKPOINT_PATH": mg})
    assert "norm epsilon 1e-06 and 1e-05, rotary base 1000000.0 and 10000.0): config.json counts" in said


def test_qwen3s_converter_has_its_sizes(tiny_hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    rest = [str(tiny_hf_folder("qwen3")), str(tmp_path / "out"), "false", "true", "bf16"]
    (command,) = translate("pai", "run_8xH20_qwen3.sh", ["A3B", *rest]).commands
    assert command.arguments.value("--to") == "torch_dist"
    with pytest.raises(UsageError, match="argument 1, MODEL_SIZE, is '7B': it must be one of 0.6B"):
        translate("pai", "run_8xH20_qwen3.sh", ["7B", *rest])


def test_converters(tiny_hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    model, out = str(tiny_hf_folder("qwen2")), str(tmp_path / "out")
    (command,) = translate("pai", "run_8xH20.sh", ["0.5B", model, out, "false", "true", "bf16"]).commands
    cfg = parse(ConvertConfig, command.arguments.argv, "x", CONVERSION).value
    assert (cfg.to, cfg.params_dtype) == ("torch_dist", "bf16")
    nine = ["0.5B", model, out, "2", "1", "bf16", "true", "false", model]
    (command,) = translate("pai", "hf2mcore_qwen2.5_convertor.sh", nine).commands
    cfg = parse(ConvertConfig, command.arguments.argv, "x", CONVERSION).value
    assert (cfg.to, cfg.degrees.flavour, cfg.degrees.transformer_impl) == ("torch", "pai", "transformer_engine")
    nine[7] = "true"
    (command,) = translate("pai", "hf2mcore_qwen2.5_convertor.sh", nine).commands
    cfg = parse(ConvertConfig, command.arguments.argv, "x", CONVERSION).value
    assert (cfg.to, cfg.hf_dir) == ("hf", model)
    with pytest.raises(UsageError, match="argument 4, MG2HF, is 'hf2mg': it must be one of true, false"):
        translate("pai", "run_8xH20.sh", ["0.5B", model, out, "hf2mg", "true", "bf16"])
