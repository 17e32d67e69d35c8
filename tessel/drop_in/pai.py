"""Pai-Megatron-Patch's scripts for Qwen2.5 and Qwen3 in terms of tessel's verbs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tessel.drop_in.arguments import Arguments
from tessel.drop_in.commands import Command, Translation
from tessel.drop_in.devices import device_count
from tessel.drop_in.positional import (
    Positional,
    dataset,
    folder,
    one_of,
    positive,
    read,
    whole,
    writable,
)
from tessel.drop_in.training import config_folder
from tessel.errors import UsageError

SIZES = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
SIZES_QWEN3 = ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "A3B", "A22B")
_MIXTURES = {"A3B": "30B-A3B", "A22B": "235B-A22B"}
_SWITCH = one_of("true", "false")
_COMPARED = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "rms_norm_eps": "norm epsilon",
    "rope_theta": "rotary base",
}
"""What MODEL_SIZE says in Pai's scripts, by its name in config.json."""


def _precision(value: str) -> str | None:
    if value == "fp8":
        return "fp8 is not supported yet: use bf16"
    return one_of("bf16", "fp16")(value)


def _offload(value: str) -> str | None:
    if value == "auto":
        return "tessel does not choose by itself what to move to host memory: use static, or a share such as 0.5"
    if value in ("false", "static"):
        return None
    return None if positive(value) is None and float(value) <= 1 else "it must be false, static or a share up to 1"


def _training_arguments(sizes: Sequence[str], of_experts: Sequence[Positional]) -> tuple[Positional, ...]:
    return (
        Positional("ENV", one_of("dsw", "dlc")),
        Positional("MODEL_SIZE", one_of(*sizes)),
        Positional("BATCH_SIZE", whole(1)),
        Positional("GLOBAL_BATCH_SIZE", whole(1)),
        Positional("LR", positive),
        Positional("MIN_LR", positive),
        Positional("SEQ_LEN", whole(1)),
        Positional("PAD_LEN", whole(1)),
        Positional("PR", _precision),
        Positional("TP", whole(1)),
        Positional("PP", whole(1)),
        Positional("CP", whole(1)),
        *of_experts,
        Positional("SP", _SWITCH),
        Positional("DO", _SWITCH),
        Positional("FL", _SWITCH),
        Positional("SFT", _SWITCH),
        Positional("AC", one_of("sel", "full", "offload", "none", "false")),
        Positional("OPTIMIZER_OFFLOAD", _offload),
        Positional("SAVE_INTERVAL", whole(1)),
        Positional("DATASET_PATH", dataset),
        Positional("VALID_DATASET_PATH", dataset),
        Positional("PRETRAIN_CHECKPOINT_PATH", folder),
        Positional("TRAIN_TOKENS_OR_ITERS", whole(1)),
        Positional("WARMUP_TOKENS_OR_ITERS", whole(0)),
        Positional("OUTPUT_BASEPATH", writable),
    )


QWEN25 = _training_arguments(SIZES, ())
QWEN3 = _training_arguments(SIZES_QWEN3, (Positional("ETP", whole(1)), Positional("EP", whole(1))))
_DISTRIBUTED_CONVERTER = (
    Positional("LOAD_DIR", folder),
    Positional("SAVE_DIR", writable),
    Positional("MG2HF", _SWITCH),
    Positional("USE_CUDA", _SWITCH),
    Positional("PR", one_of("fp32", "bf16", "fp16")),
    Positional("HF_DIR", folder, is_optional=True),
)
_CONVERTER = (
    Positional("MODEL_SIZE", one_of(*SIZES)),
    Positional("SOURCE_CKPT_PATH", folder),
    Positional("TARGET_CKPT_PATH", writable),
    Positional("TP", whole(1)),
    Positional("PP", whole(1)),
    Positional("PR", one_of("fp32", "bf16", "fp16")),
    Positional("USE_TE", _SWITCH),
    Positional("MG2HF", _SWITCH),
    Positional("HF_CKPT_PATH", folder, is_optional=True),
)


def run_mcore_qwen(argv: Sequence[str]) -> Translation:
    """examples/qwen2_5/run_mcore_qwen.sh with its 25 arguments."""
    return _training("run_mcore_qwen.sh", "Qwen2.5", read("run_mcore_qwen.sh", QWEN25, argv))


def run_mcore_qwen3(argv: Sequence[str]) -> Translation:
    """examples/qwen3/run_mcore_qwen3.sh with its 27."""
    return _training("run_mcore_qwen3.sh", "Qwen3", read("run_mcore_qwen3.sh", QWEN3, argv))


def run_8xh20(argv: Sequence[str]) -> Translation:
    """distributed_checkpoints_convertor/scripts/qwen2_5/run_8xH20.sh with its 6 or 7."""
    return _distributed(SIZES, argv)


def run_8xh20_qwen3(argv: Sequence[str]) -> Translation:
    """The same for Qwen3."""
    return _distributed(SIZES_QWEN3, argv)


def _distributed(sizes: Sequence[str], argv: Sequence[str]) -> Translation:
    """MODEL_PARALLEL_ARGS says the split."""
    given = read("run_8xH20.sh", (Positional("MODEL_SIZE", one_of(*sizes)), *_DISTRIBUTED_CONVERTER), argv)
    words = ["--load", given["LOAD_DIR"], "--save", given["SAVE_DIR"], "--params-dtype", given["PR"]]
    if given["MG2HF"] == "true":
        return _to_hf(words, given["HF_DIR"])
    split = os.environ.get("MODEL_PARALLEL_ARGS", "").split()
    remark = "torch_dist is read on any layout: one split is as good as another"
    return Translation((_command("convert", [*words, "--to", "torch_dist", *split]),), (remark,))


def hf2mcore_convertor(argv: Sequence[str]) -> Translation:
    """hf2mcore_qwen2.5_convertor.sh with its 8 or 9; of any format, to torch or to Hugging Face."""
    given = read("hf2mcore_qwen2.5_convertor.sh", _CONVERTER, argv)
    words = ["--load", given["SOURCE_CKPT_PATH"], "--save", given["TARGET_CKPT_PATH"], "--params-dtype", given["PR"]]
    if given["MG2HF"] == "true":
        return _to_hf(words, given["HF_CKPT_PATH"])
    names = "transformer_engine" if given["USE_TE"] == "true" else "local"
    split = ["--tensor-model-parallel-size", given["TP"], "--pipeline-model-parallel-size", given["PP"]]
    words += ["--to", "torch", "--flavour", "pai", "--transformer-impl", names, *split]
    return Translation((_command("convert", words),))


def _to_hf(words: list[str], hf_dir: str) -> Translation:
    return Translation((_command("convert", [*words, "--to", "hf", *(("--hf-dir", hf_dir) if hf_dir else ())]),))


def _command(verb: str, words: Sequence[str]) -> Command:
    return Command(verb, Arguments.read(words))


def _training(script: str, family: str, given: Mapping[str, str]) -> Translation:
    remarks: list[str] = []
    words: list[str] = []
    steps: tuple[Callable[[Mapping[str, str]], tuple[list[str], list[str]]], ...]
    steps = (_machine, _numbers, _layout, _memory, _data, _length)
    for step in steps:
        more, said = step(given)
        words += more
        remarks += said
    words += _output(family, given)
    remarks += _size(family, given)
    remarks.append(
        "optimizer and random state are saved, so that the run can go on; the script's --no-save-optim cannot"
    )
    num_iterations, num_warmup = _iterations(given)
    if not num_iterations:
        raise UsageError(
            f"{script}: TRAIN_TOKENS_OR_ITERS {given['TRAIN_TOKENS_OR_ITERS']} tokens are less than one iteration of "
            f"{given['GLOBAL_BATCH_SIZE']} x {given['SEQ_LEN']}: give more, or set SFT to true, where it is iterations."
        )
    if num_warmup >= _decay(given):
        raise UsageError(
            f"{script}: WARMUP_TOKENS_OR_ITERS {given['WARMUP_TOKENS_OR_ITERS']} is {num_warmup} iterations, and the "
            f"learning rate decays over {_decay(given)}: it must be less."
        )
    return Translation((_command("pretrain", words),), tuple(remarks))


def _machine(given: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Processes of this machine, and of others with ENV=dlc."""
    size = int(given["TP"]) * int(given["PP"]) * int(given["CP"])
    words: list[str] = []
    nodes = 1
    if given["ENV"] == "dsw":
        number = device_count() or size
    else:
        names = ("WORLD_SIZE", "RANK", "KUBERNETES_CONTAINER_RESOURCE_GPU", "MASTER_ADDR")
        missing = [name for name in names if not os.environ.get(name)]
        if missing:
            raise UsageError(
                f"ENV is dlc, and {', '.join(missing)} is not set: PAI-DLC sets it; on one machine use dsw."
            )
        number, nodes = int(os.environ["KUBERNETES_CONTAINER_RESOURCE_GPU"]), int(os.environ["WORLD_SIZE"])
        words = ["--nnodes", str(nodes), "--node-rank", os.environ["RANK"], "--master-addr", os.environ["MASTER_ADDR"]]
        words += ["--master-port", os.environ.get("MASTER_PORT", "6000")]
    if number * nodes % size:
        raise UsageError(
            f"TP {given['TP']} x PP {given['PP']} x CP {given['CP']} is {size}, which does not divide the "
            f"{number * nodes} processes: choose others."
        )
    return [*words, "--nproc-per-node", str(number)], []


def _numbers(given: Mapping[str, str]) -> tuple[list[str], list[str]]:
    words = (
        f"--micro-batch-size {given['BATCH_SIZE']} --global-batch-size {given['GLOBAL_BATCH_SIZE']} "
        f"--seq-length {given['SEQ_LEN']} --lr {given['LR']} --min-lr {given['MIN_LR']} --lr-decay-style cosine "
        f"--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --init-method-std 0.008 "
        f"--{given['PR']} --attention-dropout 0.0 --hidden-dropout 0.0 --no-load-optim --no-load-rng"
    ).split()
    if given["FL"] == "false":
        words += ["--attention-backend", "fused"]
    return words, []


def _layout(given: Mapping[str, str]) -> tuple[list[str], list[str]]:
    words = ["--tensor-model-parallel-size", given["TP"], "--pipeline-model-parallel-size", given["PP"]]
    words += ["--context-parallel-size", given["CP"], "--overlap-grad-reduce", "--overlap-param-gather"]
    if given["SP"] == "true" and int(given["TP"]) > 1:
        words.append("--sequence-parallel")
    if given["DO"] == "true" or given["OPTIMIZER_OFFLOAD"] != "false":
        words.append("--use-distributed-optimizer")
    if int(given.get("EP", "1")) > 1:
        words += ["--expert-model-parallel-size", given["EP"], "--expert-tensor-parallel-size", given["ETP"]]
    if given["MODEL_SIZE"] in _MIXTURES:
        words += ["--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.001"]
    if os.environ.get("MP_VP"):
        words += ["--num-layers-per-virtual-pipeline-stage", os.environ["MP_VP"]]
    if os.environ.get("MP_PP0_LAYERS"):
        words += ["--decoder-first-pipeline-num-layers", os.environ["MP_PP0_LAYERS"]]
    return words, []


def _memory(given: Mapping[str, str]) -> tuple[list[str], list[str]]:
    layers = os.environ.get("MP_AC_LAYERS") or "1"
    activations = {
        "full": ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", layers],
        "sel": ["--recompute-activations"],
        "offload": ["--cpu-offloading", "--cpu-offloading-num-layers", layers],
    }
    words = list(activations.get(given["AC"], []))
    if given["OPTIMIZER_OFFLOAD"] != "false":
        share = "1.0" if given["OPTIMIZER_OFFLOAD"] == "static" else given["OPTIMIZER_OFFLOAD"]
        words += ["--optimizer-cpu-offload", "--optimizer-offload-fraction", share]
    return words, []


def _data(given: Mapping[str, str]) -> tuple[list[str], list[str]]:
    kind = os.environ.get("MP_DATASET_TYPE") or "idxmap"
    if kind not in ("idxmap", "raw"):
        raise UsageError(f"MP_DATASET_TYPE is {kind!r}: it must be idxmap or raw.")
    words = ["--train-mode", "finetune" if given["SFT"] == "true" else "pretrain", "--num-workers", "8"]
    if given["SFT"] == "true":
        words += ["--eod-mask-loss", "--calculate-per-token-loss"]
    if os.environ.get("MP_SFT_PACKING") == "true":
        words.append("--reset-position-ids")
    if kind == "raw":
        if given["SFT"] != "true":
            raise UsageError(
                "MP_DATASET_TYPE is raw, and SFT is false: dialogues are for fine-tuning, set SFT to true."
            )
        words += ["--train-data-path", given["DATASET_PATH"], "--valid-data-path", given["VALID_DATASET_PATH"]]
        words += ["--dataloader-type", "cyclic", "--dataset", "JSON-SFT", "--max-padding-length", given["PAD_LEN"]]
        return words, []
    prefix = given["DATASET_PATH"].removesuffix(".bin").removesuffix(".idx")
    said = [f"DATASET_PATH names a file: its prefix {prefix} is taken"] if prefix != given["DATASET_PATH"] else []
    return [*words, "--data-path", prefix, "--split", "99,1,0", "--dataset", "MMAP"], said


def _length(given: Mapping[str, str]) -> tuple[list[str], list[str]]:
    steps, warmup = _iterations(given)
    words = ["--train-iters", str(steps), "--lr-warmup-iters", str(warmup), "--lr-decay-iters", str(_decay(given))]
    remark = f"{steps} iterations, {warmup} of them warm-up"
    if given["SFT"] == "false":
        remark += f": {given['TRAIN_TOKENS_OR_ITERS']} tokens / {given['GLOBAL_BATCH_SIZE']} / {given['SEQ_LEN']}"
    return words, [remark]


def _iterations(given: Mapping[str, str]) -> tuple[int, int]:
    """Iterations, and those of the warm-up: as given when fine-tuning, else out of tokens."""
    train, warmup = int(given["TRAIN_TOKENS_OR_ITERS"]), int(given["WARMUP_TOKENS_OR_ITERS"])
    if given["SFT"] == "true":
        return train, warmup
    batch = int(given["GLOBAL_BATCH_SIZE"]) * int(given["SEQ_LEN"])
    return train // batch, warmup // batch


def _decay(given: Mapping[str, str]) -> int:
    """Iterations over which the learning rate decays: when fine-tuning, those after the warm-up."""
    steps, warmup = _iterations(given)
    return max(steps - warmup if given["SFT"] == "true" else steps, 1)


def _output(family: str, given: Mapping[str, str]) -> list[str]:
    """Where checkpoints and events go, under the script's long name of the run."""
    kind = "finetune" if given["SFT"] == "true" else "pretrain"
    steps, warmup = _iterations(given)
    name = (
        f"{kind}-mcore-{family.lower()}-{given['MODEL_SIZE']}-lr-{given['LR']}-minlr-{given['MIN_LR']}"
        f"-bs-{given['BATCH_SIZE']}-gbs-{given['GLOBAL_BATCH_SIZE']}-seqlen-{given['SEQ_LEN']}-pr-{given['PR']}"
        f"-tp-{given['TP']}-pp-{given['PP']}-cp-{given['CP']}-ac-{given['AC']}-do-{given['DO']}-sp-{given['SP']}"
        f"-ti-{steps}-wi-{warmup}"
    )
    base = Path(given["OUTPUT_BASEPATH"])
    events = base / "tensorboard" / f"{name}_{time.strftime('%Y.%m.%d-%H.%M.%S')}"
    return [
        *("--load", given["PRETRAIN_CHECKPOINT_PATH"], "--save", str(base / "checkpoint" / name)),
        *("--save-interval", given["SAVE_INTERVAL"], "--ckpt-format", "torch_dist", "--tensorboard-dir", str(events)),
        *("--tensorboard-queue-size", "1", "--log-timers-to-tensorboard", "--log-validation-ppl-to-tensorboard"),
        *("--log-interval", "1", "--log-throughput", "--eval-interval", "10000", "--eval-iters", "10"),
    ]


def _size(family: str, given: Mapping[str, str]) -> list[str]:
    """MODEL_SIZE says nothing here but what it can be checked against: config.json."""
    from tessel.model.catalog import known_model
    from tessel.model.config import ModelConfig

    path = config_folder(given["PRETRAIN_CHECKPOINT_PATH"])
    if path is None:
        return []
    size = given["MODEL_SIZE"]
    named, actual = known_model(f"{family}-{_MIXTURES.get(size, size)}"), ModelConfig.from_folder(path)
    differ = [
        f"{what} {getattr(named, name)} and {getattr(actual, name)}"
        for name, what in _COMPARED.items()
        if getattr(named, name) != getattr(actual, name)
    ]
    if not differ:
        return []
    return [f"MODEL_SIZE {size} and {path / 'config.json'} differ ({', '.join(differ)}): config.json counts"]
