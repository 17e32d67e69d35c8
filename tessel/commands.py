"""One short function a verb: read its command line, check it, do it.

The first sentence of a docstring is the verb's line in `tessel --help`. What does the work is
imported inside, so that `--help` and errors of the command line need no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tessel.config import convert as conversion
from tessel.config import verbs
from tessel.config.chat import ChatConfig, validate_chat
from tessel.config.download_rules import validate_download
from tessel.config.evaluate import EvaluateConfig, validate_evaluate
from tessel.config.generate_rules import validate_generate
from tessel.config.megatron import MEGATRON
from tessel.config.plan_rules import validate_plan
from tessel.config.preprocess import MergeConfig, PreprocessConfig, SplitConfig
from tessel.config.preprocess_flags import PREPROCESSING
from tessel.config.preprocess_rules import validate_merge, validate_preprocess, validate_split
from tessel.config.selftest import SelftestConfig, validate_selftest
from tessel.config.serve import ServeConfig, validate_serve
from tessel.config.templates import TemplatesConfig, validate_templates
from tessel.config.validate import validate_samples
from tessel.entry import note, read, use_model
from tessel.errors import TesselError
from tessel.runtime.log import voice
from tessel.runtime.world import World
from tessel.training import train


def pretrain(argv: list[str]) -> None:
    """Train a model on text, from a Hugging Face folder or from random weights."""
    train("pretrain", argv)


def sft(argv: list[str]) -> None:
    """Fine-tune a model on dialogues, whole or by adapters (LoRA)."""
    train("sft", argv)


def dpo(argv: list[str]) -> None:
    """Teach a model which of two answers is preferred (DPO)."""
    train("dpo", argv)


def preprocess(argv: list[str]) -> None:
    """Tokenize text files into a .bin/.idx dataset."""
    cfg = read(PreprocessConfig, argv, "preprocess", validate_preprocess, PREPROCESSING)
    if cfg is None:
        return
    if cfg.preview is not None:
        from tessel.data.instruct.preview import preview

        preview(cfg)
        return
    if cfg.merge_group_keys:
        from tessel.data.merge import merge_datasets as merge_all

        merge_all(MergeConfig(input=cfg.input, output_prefix=cfg.output_prefix, merge_group_keys=cfg.merge_group_keys))
        return
    from tessel.data import preprocess as target

    target.preprocess(cfg)


def merge_datasets(argv: list[str]) -> None:
    """Write several .bin/.idx datasets as one."""
    cfg = read(MergeConfig, argv, "merge-datasets", validate_merge)
    if cfg is None:
        return
    from tessel.data import merge as target

    target.merge_datasets(cfg)


def split(argv: list[str]) -> None:
    """Deal the documents of a dataset out to several, such as train and valid."""
    cfg = read(SplitConfig, argv, "split", validate_split)
    if cfg is None:
        return
    from tessel.data import merge as target

    target.split_dataset(cfg)


def samples(argv: list[str]) -> None:
    """Show what a run trains on: the samples of any step, back to their documents."""
    cfg = read(verbs.SamplesConfig, argv, "samples", validate_samples, MEGATRON)
    if cfg is None:
        return
    from tessel.data import show as target
    from tessel.train.batch_size import batch_size_of, train_iters_for

    batch_size = batch_size_of(cfg.run.batch)
    train_samples = cfg.run.batch.train_samples
    train_iters = None if train_samples is None else train_iters_for(train_samples, batch_size)
    target.show_samples(cfg, batch_size.at, train_iters)


def generate(argv: list[str]) -> None:
    """Continue prompts with a trained model."""

    def target(cfg: verbs.GenerateConfig, given: frozenset[str]) -> None:
        from tessel.generate import command

        command.generate(cfg, given)

    use_model(verbs.GenerateConfig, argv, "generate", lambda cfg, _: validate_generate(cfg), target)


def evaluate(argv: list[str]) -> None:
    """Ask a trained model the questions of MMLU, C-Eval, CMMLU and other sets."""

    def target(cfg: EvaluateConfig, given: frozenset[str]) -> None:
        from tessel.evaluate import command
        from tessel.report.bars import CHART, draw_accuracies

        results = command.evaluate(cfg, given)
        if results is not None and cfg.output is not None and voice.is_heard:
            draw_accuracies(results, Path(cfg.output) / CHART)

    use_model(EvaluateConfig, argv, "evaluate", lambda cfg, _: validate_evaluate(cfg), target, replicas=True)


def chat(argv: list[str]) -> None:
    """Talk with a trained model."""

    def target(cfg: ChatConfig, given: frozenset[str]) -> None:
        from tessel.generate import chat as verb

        verb.chat(cfg, given)

    use_model(ChatConfig, argv, "chat", validate_chat, target)


def serve(argv: list[str]) -> None:
    """Serve a trained model over HTTP, with OpenAI's API and a chat page."""

    def target(cfg: ServeConfig, given: frozenset[str]) -> None:
        try:
            from tessel.serve import command
        except ImportError as error:
            raise TesselError(f"tessel serve needs {error.name}: pip install 'tessel[serve]'.") from error
        command.serve(cfg, given)

    use_model(ServeConfig, argv, "serve", validate_serve, target)


def inspect(argv: list[str]) -> None:
    """Say what a model folder, a run or a dataset holds."""
    cfg = read(verbs.InspectConfig, argv, "inspect")
    if cfg is None:
        return
    from tessel.report import inspect as target

    target.inspect(cfg)


def templates(argv: list[str]) -> None:
    """List prompt types, or compare them with a tokenizer's chat template."""
    cfg = read(TemplatesConfig, argv, "templates", validate_templates)
    if cfg is None:
        return
    from tessel.report import templates as target

    if not target.templates(cfg):
        raise SystemExit(1)


def convert(argv: list[str]) -> None:
    """Write a checkpoint in another format or layout, and prove it."""
    cfg = read(conversion.ConvertConfig, argv, "convert", conversion.validate_convert, conversion.CONVERSION)
    if cfg is None:
        return
    from tessel.convert import convert as target

    target.convert(cfg)


def merge(argv: list[str]) -> None:
    """Put an adapter into its model, as a Hugging Face folder."""
    cfg = read(conversion.MergeConfig, argv, "merge")
    if cfg is None:
        return
    from tessel.convert import convert as target

    target.merge(cfg)


def verify(argv: list[str]) -> None:
    """Compare two checkpoints of any formats, tensor by tensor."""
    cfg = read(conversion.VerifyConfig, argv, "verify", conversion.validate_verify)
    if cfg is None:
        return
    from tessel.convert import verify as target

    if not target.verify(cfg):
        raise SystemExit(1)


def download(argv: list[str]) -> None:
    """Fetch a model, a dataset or any file, and check every byte of it."""
    cfg = read(verbs.DownloadConfig, argv, "download", validate_download)
    if cfg is None:
        return
    from tessel.download import command as target

    target.download(cfg)


def doctor(argv: list[str]) -> None:
    """Say what this machine has, and what is missing for which verb."""
    cfg = read(verbs.DoctorConfig, argv, "doctor")
    if cfg is None:
        return
    from tessel.report import doctor as target

    target.doctor(cfg)


def selftest(argv: list[str]) -> None:
    """Test whether this machine computes what it should, and how fast."""
    cfg = read(SelftestConfig, argv, "selftest", validate_selftest)
    if cfg is None:
        return
    from tessel.selftest import command as target

    raise SystemExit(target.selftest(cfg))


def plan(argv: list[str]) -> None:
    """List the layouts of a model that fit on so many devices, with memory and speed."""
    cfg = read(verbs.PlanConfig, argv, "plan", validate_plan)
    if cfg is None:
        return
    from tessel.report import plan as target

    target.plan(cfg)


def plot(argv: list[str]) -> None:
    """Draw the loss curves of runs side by side."""
    cfg = read(verbs.PlotConfig, argv, "plot")
    if cfg is None:
        return
    from tessel.report import plot as target

    target.plot(cfg)


def flags(argv: list[str]) -> None:
    """Say what becomes of each flag of MindSpeed-LLM, ModelLink, Pai and Megatron-LM."""
    cfg = read(verbs.FlagsConfig, argv, "flags")
    if cfg is None:
        return
    from tessel.drop_in import table as target

    target.show(cfg)


def drop_in(argv: list[str]) -> None:
    """Do what a program of another suite would: SUITE PROGRAM ARGUMENTS."""
    from tessel.drop_in.run import run

    voice.speak_as(World.from_environment().rank)
    run(argv, VERBS, note)


def migrate(argv: list[str]) -> None:
    """Print the command and the YAML in place of another suite's shell script."""
    cfg = read(verbs.MigrateConfig, argv, "migrate")
    if cfg is None:
        return
    from tessel.drop_in import migrate as target

    target.migrate(cfg)


def demo(argv: list[str]) -> None:
    """Train a small model on real text from start to end, in about two minutes."""
    cfg = read(verbs.DemoConfig, argv, "demo")
    if cfg is None:
        return
    from tessel import demo as target

    target.demo(cfg)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "pretrain": pretrain,
    "sft": sft,
    "dpo": dpo,
    "preprocess": preprocess,
    "merge-datasets": merge_datasets,
    "split": split,
    "samples": samples,
    "generate": generate,
    "chat": chat,
    "evaluate": evaluate,
    "serve": serve,
    "inspect": inspect,
    "templates": templates,
    "download": download,
    "convert": convert,
    "merge": merge,
    "verify": verify,
    "doctor": doctor,
    "selftest": selftest,
    "plan": plan,
    "plot": plot,
    "flags": flags,
    "drop-in": drop_in,
    "migrate": migrate,
    "demo": demo,
}
