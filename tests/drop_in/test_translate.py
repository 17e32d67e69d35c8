"""Command lines of the suites' programs, in terms of tessel's verbs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.cli import main
from tessel.config.convert import CONVERSION, ConvertConfig
from tessel.config.megatron import MEGATRON
from tessel.config.parser import parse
from tessel.config.run import RunConfig
from tessel.drop_in.arguments import Arguments, Given
from tessel.drop_in.flags import Kind
from tessel.drop_in.translate import tidy, translate
from tessel.errors import UsageError


def one(suite: str, program: str, line: str) -> tuple[str, Arguments, str]:
    """The only command of a translation: verb, arguments, and all remarks."""
    done = translate(suite, program, line.split())
    (command,) = done.commands
    return command.verb, command.arguments, " ".join(done.remarks)


def test_arguments_come_apart_and_together() -> None:
    read = Arguments.read(["first", "--a_b=1", "-1", "--c", "--d", "x", "y"])
    assert read.given == (Given("", ("first",)), Given("--a-b", ("1", "-1")), Given("--c"), Given("--d", ("x", "y")))
    assert read.argv == ("first", "--a-b", "1", "-1", "--c", "--d", "x", "y")
    assert (read.value("--a-b"), read.values("--d"), read.value("--c"), read.value("--e")) == (
        "1",
        ("x", "y"),
        None,
        None,
    )
    assert read.without("--d").plus("--e", "2").argv == ("first", "--a-b", "1", "-1", "--c", "--e", "2")


def test_mindspeeds_converter() -> None:
    line = (
        "--use-mcore-models --model-type GPT --load-model-type hf --save-model-type mg --target-tensor-parallel-size 1 "
        "--target-pipeline-parallel-size 4 --add-qkv-bias --load-dir a --save-dir b --tokenizer-model a/tokenizer.json "
        "--model-type-hf llama2 --params-dtype bf16"
    )
    verb, arguments, remarks = one("mindspeed", "convert_ckpt.py", line)
    cfg = parse(ConvertConfig, arguments.argv, "x", CONVERSION).value
    assert (verb, cfg.load, cfg.save, cfg.to, cfg.params_dtype) == ("convert", "a", "b", "torch", "bf16")
    assert (cfg.degrees.pipeline_model_parallel_size, cfg.degrees.flavour) == (4, "v1")
    assert not remarks
    assert "fp16" in one("mindspeed", "convert_ckpt.py", line.replace("--params-dtype bf16", ""))[2]


def test_converters_back(tiny_hf_folder: Callable[..., Path]) -> None:
    original = tiny_hf_folder("llama")
    back = f"--load-dir mg --save-dir {original}"
    _, arguments, said = one("mindspeed", "convert_ckpt.py", f"--use-mcore-models --save-model-type hf {back}")
    assert arguments.value("--save") == f"{original}/mg2hf"
    assert (arguments.value("--to"), arguments.value("--hf-dir")) == ("hf", str(original))
    assert f"{original}/mg2hf" in said
    line = f"--loader megatron --saver megatron --save-model-type save_huggingface_llama {back}"
    assert one("modellink", "tools/checkpoint/convert_ckpt.py", line)[1].value("--save") == f"{original}/mg2hg"
    _, arguments, _ = one("mindspeed", "convert_ckpt_v2.py", "--save-model-type hf --load-dir mg --save-dir new")
    assert (arguments.value("--save-dir"), arguments.value("--to")) == ("new", "hf")


def test_other_converters() -> None:
    legacy = "--model-type GPT --loader llama2_hf --saver megatron --load-dir a --save-dir b --num-layer-list 8,8"
    assert one("modellink", "convert_ckpt.py", legacy)[1].value("--to") == "legacy"
    line = "--cvt-type hf2mg --hf-dir a --mg-dir b --model-name llama --num-layers 32"
    _, arguments, _ = one("mindspeed", "convert_param.py", line)
    cfg = parse(ConvertConfig, arguments.argv, "x", CONVERSION).value
    assert (cfg.load, cfg.save, cfg.to) == ("a", "b", "torch")
    _, arguments, _ = one("pai", "impl/convert.py", "--load-dir a --save-dir b --use-gpu --num-layers 24 --bf16")
    cfg = parse(ConvertConfig, arguments.argv, "x", CONVERSION).value
    assert (cfg.to, cfg.degrees.flavour) == ("torch_dist", "mcore")
    with pytest.raises(UsageError, match=r"chatglm3 is not a family that tessel knows.*docs/MIGRATION.md"):
        one("mindspeed", "convert_ckpt.py", "--model-type-hf chatglm3 --load-dir a --save-dir b")


def test_training_starts_at_random_where_load_is_empty(tiny_hf_folder: Callable[..., Path]) -> None:
    folder = tiny_hf_folder("qwen3")
    line = f"--tokenizer-name-or-path {folder} --load --save out --npu-deterministic --attention-dropout 0"
    verb, arguments, said = one("mindspeed", "pretrain_gpt.py", line)
    cfg = parse(RunConfig, arguments.argv, "x", MEGATRON).value
    assert verb == "pretrain"
    assert cfg.model.init_from_config == str(folder)
    assert cfg.precision.deterministic_mode
    assert cfg.checkpoint.ckpt_format == ("torch",)
    assert f"the start is random, of the shape in {folder}/config.json" in said
    assert "the suite's is 0.1" in said


def test_training_takes_the_models_word_for_what_scripts_have_wrong(tiny_hf_folder: Callable[..., Path]) -> None:
    folder = tiny_hf_folder("qwen2")
    line = f"--load {folder} --norm-epsilon 1e-5 --rotary-base 1000000 --attention-dropout 0 --hidden-dropout 0"
    _, arguments, said = one("pai", "pretrain_qwen2_moe.py", line)
    assert not arguments.has("--norm-epsilon")
    assert arguments.has("--rotary-base")
    assert said == "--norm-epsilon 1e-05 (the model: 1e-06): the model counts"


def test_a_dataset_may_be_named_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "a_text_document.idx").touch()
    line = f"--data-path 1 {tmp_path}/a_text_document.bin 2 b.bin"
    _, arguments, said = one("mindspeed", "pretrain_gpt.py", line)
    assert arguments.values("--data-path") == ("1", f"{tmp_path}/a_text_document", "2", "b.bin")
    assert "--data-path names a file: its prefix is taken" in said


def test_generation_has_the_suites_demonstrations(tiny_hf_folder: Callable[..., Path]) -> None:
    folder = tiny_hf_folder("qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    done = translate("mindspeed", "inference.py", ["--load", str(folder)])
    assert [command.verb for command in done.commands] == ["generate"] * 4
    assert done.remarks[-1].startswith("no chat: ") and done.commands[0].arguments.has("--bf16")
    (folder / "chat_template.jinja").touch()
    done = translate("mindspeed", "inference.py", ["--load", str(folder), "--history-turns", "3"])
    assert [command.verb for command in done.commands] == ["generate"] * 4 + ["chat"]
    first, chat = done.commands[0].arguments, done.commands[-1].arguments
    assert (first.values("--task"), first.value("--prompt")) == (("greedy",), "how are you?")
    assert (first.value("--top-k"), chat.value("--history-turns"), first.has("--history-turns")) == ("50", "3", False)
    assert translate("mindspeed", "inference.py", ["--task", "chat"]).commands[0].verb == "chat"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_precision_is_that_of_a_checkpoint_that_has_no_config(
    tiny_hf_folder: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    mg = tmp_path / "mg"
    line = f"convert --load {tiny_hf_folder('qwen2')} --save {mg} --to torch --flavour v1 --params-dtype {dtype}"
    assert main(line.split()) == 0
    for path in mg.rglob("*.json"):
        path.unlink()  # the suites' own checkpoints have none
    for program in ("inference.py", "evaluation.py"):
        (command,) = translate("mindspeed", program, ["--load", str(mg), "--task", "greedy"]).commands
        assert [flag for flag in ("--bf16", "--fp16", "--fp32") if command.arguments.has(flag)] == [f"--{dtype}"]


def test_generation_takes_the_processes_of_one_model() -> None:
    line = "--task greedy --load m --nproc-per-node 8 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    _, arguments, said = one("mindspeed", "inference.py", line)
    assert arguments.values("--nproc-per-node") == ("4",)
    assert "4 of 8 processes" in said
    _, arguments, _ = one("mindspeed", "inference.py", line.replace("node 8", "node 3"))
    assert arguments.values("--nproc-per-node") == ("3",)


def test_storage_of_one_machine_is_shared() -> None:
    line = "--load m --save s --no-shared-storage --nproc-per-node 8 --nnodes 1"
    _, arguments, said = one("mindspeed", "pretrain_gpt.py", line)
    assert not arguments.has("--no-shared-storage") and arguments.value("--ckpt-format") == "torch"
    assert "this is one machine" in said
    _, arguments, said = one("mindspeed", "pretrain_gpt.py", line.replace("nnodes 1", "nnodes 2"))
    assert arguments.has("--no-shared-storage") and not arguments.has("--ckpt-format")
    assert "in torch_dcp" in said


def test_evaluation_is_by_what_the_model_writes() -> None:
    line = "--task mmlu --task-data-path ./mmlu/test --evaluation-batch-size 4 --load m --broadcast --temperature 0.5"
    verb, arguments, said = one("mindspeed", "evaluation.py", line)
    assert verb == "evaluate"
    assert (arguments.value("--task"), arguments.value("--data-path")) == ("mmlu", "./mmlu/test")
    assert arguments.value("--rule") == "generate"
    assert not arguments.has("--broadcast") and not arguments.has("--temperature")
    assert "--rule choice" in said
    assert len(translate("mindspeed", "evaluation.py", "--task mmlu ceval --task-data-path a b".split()).commands) == 2


def test_the_harness_that_pai_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cmmlu").mkdir()
    (tmp_path / "ceval").mkdir()
    (tmp_path / "harness").mkdir()
    monkeypatch.chdir(tmp_path / "harness")
    line = "--model hf --model_args pretrained=back,trust_remote_code=True --tasks cmmlu,ceval-valid --batch_size 16"
    monkeypatch.setattr("tessel.drop_in.use._has_harness", lambda: True)
    done = translate("pai", "lm_eval", line.split())
    assert [" ".join(command.arguments.argv) for command in done.commands] == [
        "--load back --batch-size 16 --harness --task cmmlu ceval-valid --data-dir cmmlu=../cmmlu ceval-valid=../ceval"
    ]
    assert done.remarks == ("trust_remote_code is left out: code of a model's folder is never run",)
    (command,) = translate("pai", "lm_eval", f"{line} --device cuda:0 --limit 5".split()).commands
    assert (command.arguments.value("--device"), command.arguments.value("--limit")) == ("cuda", "5")
    monkeypatch.setattr("tessel.drop_in.use._has_harness", lambda: False)
    done = translate("pai", "lm_eval", line.split())
    assert [" ".join(command.arguments.argv) for command in done.commands] == [
        "--load back --batch-size 16 --task cmmlu --rule choice --data-path ../cmmlu",
        "--load back --batch-size 16 --task ceval-valid --rule choice --data-path ../ceval",
    ]
    assert "lm-eval is not installed" in done.remarks[1]
    for wrong, message in (
        (line + " --use_cache x", "--use-cache has no place here"),
        (line.replace("pretrained=back", "pretrained=back,peft=a"), "--model_args peft has no place here"),
        (line.replace("cmmlu,", "mmlu,"), "there is no folder mmlu here or beside"),
        (line.replace("--model hf", "--model vllm"), "--model hf"),
        (line.replace("pretrained=back,", ""), "needs pretrained=DIR"),
    ):
        with pytest.raises(UsageError, match=message):
            translate("pai", "lm_eval", wrong.split())


def test_preprocessing_says_that_documents_have_no_end() -> None:
    assert "--append-eod" in one("mindspeed", "preprocess_data.py", "--input a --output-prefix b")[2]
    assert not one("mindspeed", "preprocess_data.py", "--input a --output-prefix b --append-eod")[2]
    assert one("pai", "build_idxmap_sft_dataset.py", "--input a")[1].value("--compatible") == "pai-sft"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--o2-gradient --lr 1", "--grad-reduce-in-bf16 --lr 1"),
        ("--hierarchical-context-parallel-sizes 2 4 --lr 1", "--ulysses-degree-in-cp 2 --lr 1"),
        ("--attention-mask-type causal --jit-compile --batch-size 4", "--micro-batch-size 4"),
        ("--rotary-seq-len-interpolation-factor 1 --lr 1", "--lr 1"),
    ],
)
def test_flags_that_mean_one_of_tessels(line: str, wanted: str) -> None:
    assert " ".join(one("mindspeed", "pretrain_gpt.py", line)[1].argv) == wanted


@pytest.mark.parametrize(
    ("line", "kept", "why"),
    [
        (
            "--sequence-parallel --use-ascend-coc",
            "",
            "--sequence-parallel left out, as by the suite: --tensor-model-par",
        ),
        (
            "--sequence-parallel --tensor-model-parallel-size 2",
            "--sequence-parallel --tensor-model-parallel-size 2",
            "",
        ),
        ("--use-ascend-mc2 --tensor-model-parallel-size 2", "--tensor-model-parallel-size 2", "no --sequence-parallel"),
        (
            "--recompute-granularity full --recompute-method block --swap-attention",
            "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
            "--swap-attention left out",
        ),
        (
            "--recompute-num-layers 4",
            "",
            "--recompute-num-layers left out, as by the suite: no --recompute-granularity",
        ),
        ("--is-instruction-dataset --is-pairwise-dataset", "--is-pairwise-dataset", "what the data is"),
        ("--context-parallel-size 4 --ulysses-degree-in-cp 2", "--context-parallel-size 4", "no hybrid_cp_algo"),
        (
            "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
            "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
            "",
        ),
    ],
)
def test_what_a_suite_sets_aside_is_left_out(line: str, kept: str, why: str) -> None:
    _, arguments, said = one("mindspeed", "pretrain_gpt.py", line)
    assert " ".join(arguments.argv) == kept
    assert why in said


def test_of_adapters_the_adapters_are_saved() -> None:
    _, arguments, said = one("mindspeed", "posttrain_gpt.py", "--load m --save s --lora-r 8")
    assert not arguments.has("--ckpt-format") and "the adapters alone are saved" in said


def test_tidy_keeps_what_acts() -> None:
    line = "--lr 1 --use-mcore-models --spec a b --fp8-format hybrid --no-such-flag 3 --layernorm-epsilon 1e-6"
    (command,) = translate("mindspeed", "pretrain_gpt.py", line.split()).commands
    kept, remarks = tidy(command)
    assert kept.arguments.argv == ("--lr", "1", "--layernorm-epsilon", "1e-6")
    assert {remark.kind for remark in remarks} == {Kind.MEANINGLESS, Kind.REFUSED, Kind.UNKNOWN}
    assert "meaningless: --use-mcore-models --spec (there is one model implementation)" in map(str, remarks)


@pytest.mark.parametrize(
    ("suite", "program", "message"),
    [
        ("deepspeed", "pretrain_gpt.py", "it must be one of mindspeed, modellink, pai"),
        ("mindspeed", "ray_gpt.py", "tessel has nothing in place of ray_gpt.py"),
    ],
)
def test_what_is_not_known_is_refused(suite: str, program: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        translate(suite, program, [])
