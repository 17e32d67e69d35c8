"""What shared beginnings save in evaluation, and the time against lm-evaluation-harness's own model, in one run.

    python benchmarks/evaluate.py --data ../shared/data/eval       # MMLU and CMMLU, five-shot, on a CPU in fp32
    python benchmarks/evaluate.py --data DIR --load MODEL --tasks mmlu --questions 100

- The ratio of tokens, over all questions of a set: those that the texts have, by those that are computed.
- The time: the same questions of some subjects, with the same model, by `tessel evaluate --rule choice` and by
  lm-evaluation-harness's `--model hf` with batches of 1, 8 and auto, each a process of its own. What is timed is
  tokenizing and scoring; contexts are there before. Seconds are of the process's own CPU time (one thread by default).

The model is random, of 29 million parameters with a byte-level BPE of 8,192 entries made from the sets' own solved
questions, unless --load names another. Answers must be the same, and log-probabilities equal to 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"mmlu": "mmlu/data/test", "cmmlu": "cmmlu/test"}
SUBJECTS = {"mmlu": ("anatomy", "world_religions"), "cmmlu": ("agronomy", "chinese_history")}
BATCHES = ("1", "8", "auto")
WANTED = 0.8
VOCABULARY = 8192


def make_model(folder: Path, data: Path) -> None:
    """A random model with a tokenizer of the sets' own words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    texts = [path.read_text(encoding="utf-8") for split in SPLITS.values() for path in (data / split).rglob("*.csv")]
    tokenizer.train_from_iterator(texts, trainer)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    saved.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY + 64,  # a round number that has room for what the tokenizer adds
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=saved.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def items_of(task: str, data: Path, num_questions: int | None) -> list[Any]:
    """Five-shot questions: of some subjects, or with None all."""
    from tessel.config.evaluate import EvaluateConfig
    from tessel.config.verbs import Loading
    from tessel.evaluate.exam import make_exam

    cfg = EvaluateConfig(
        task=(task,),
        rule="choice",
        num_fewshot=5,
        data_path=str(data / SPLITS[task]),
        subjects=() if num_questions is None else SUBJECTS[task],
        limit=num_questions,
        loading=Loading(),
    )
    return list(make_exam(cfg, None).items)  # type: ignore[arg-type]  # text is made without a tokenizer


def saving(task: str, data: Path, model: Path) -> dict[str, Any]:
    """Tokens of a whole set, and those that would be computed: the scorer runs with a model that computes nothing."""
    import torch

    from tessel.config.tokenizer import Tokenizer as TokenizerSection
    from tessel.data.tokenizer import load_tokenizer
    from tessel.evaluate.answers import choose
    from tessel.evaluate.scorer import Scorer

    class Nothing:
        config = SimpleNamespace(max_position_embeddings=1 << 20)

        def __call__(self, tokens: Any, positions: Any, *, cache: Any, logits: Any) -> Any:
            return torch.zeros(1, len(logits), 1).expand(1, -1, vocabulary)

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer = load_tokenizer(TokenizerSection(), model, vocabulary - 1)
    scorer = Scorer(Nothing())  # type: ignore[arg-type]
    questions = sum(1 for _ in choose(scorer, tokenizer, items_of(task, data, None)))
    counts = scorer.counts
    return {"questions": questions, "tokens": counts.text_tokens, "computed": counts.computed_tokens}


def by_tessel(items: list[Any], model: Path) -> tuple[float, list[list[float]], float]:
    """CPU seconds, log-probabilities of each question's answers, and the ratio of tokens."""
    from tessel.config.verbs import Loading
    from tessel.evaluate.answers import choose
    from tessel.evaluate.scorer import Scorer
    from tessel.generate.load import open_for_use

    with open_for_use(Loading(load=str(model), device="cpu")) as opened:
        started_s = time.process_time()
        scorer = Scorer(opened.model, opened.device)
        found = {outcome.key: list(outcome.scores.values()) for outcome in choose(scorer, opened.tokenizer, items)}
        elapsed_s = time.process_time() - started_s
    return elapsed_s, [found[item.key] for item in items], scorer.counts.saving


def by_harness(items: list[Any], model: Path, batch: str) -> tuple[float, list[list[float]], float]:
    """The same, by lm-evaluation-harness."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=batch if batch == "auto" else int(batch))
    requests = [
        Instance("loglikelihood", {}, (item.context, answer), i)
        for item in items
        for i, answer in enumerate(item.continuations)
    ]
    started_s = time.process_time()
    found = [logprob for logprob, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    elapsed_s = time.process_time() - started_s
    return elapsed_s, [found[i : i + 4] for i in range(0, len(found), 4)], 1.0


def measured(side: str, args: argparse.Namespace, task: str, model: Path) -> dict[str, Any]:
    """One side, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--tasks",
        task,
        "--data",
        str(args.data),
        "--load",
        str(model),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--load", str(model), "--questions", str(args.questions)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_side(args: argparse.Namespace) -> None:
    """The part of a process that measures."""
    (task,) = args.tasks
    items = items_of(task, args.data, args.questions)
    if args.side == "tessel":
        seconds, scores, ratio = by_tessel(items, args.load)
    else:
        seconds, scores, ratio = by_harness(items, args.load, args.side)
    print(json.dumps({"seconds": seconds, "scores": scores, "ratio": ratio}))


def compare(args: argparse.Namespace, task: str, model: Path) -> bool:
    """Print a set's figures; whether they are as wanted."""
    whole = saving(task, args.data, model)
    ratio = whole["tokens"] / whole["computed"]
    print(
        f"{task}, five-shot, all {whole['questions']:,} questions: {whole['tokens']:,} tokens, {whole['computed']:,} "
        f"computed: {ratio:.2f} times fewer"
    )
    own = measured("tessel", args, task, model)
    print(
        f"  {len(own['scores'])} questions of {', '.join(SUBJECTS[task])}: tessel {own['seconds']:.1f} s, "
        f"{own['ratio']:.2f} times fewer tokens"
    )
    best, same = float("inf"), True
    for batch in args.batches:
        other = measured(batch, args, task, model)
        pairs = list(zip(own["scores"], other["scores"], strict=True))
        equal = sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs)
        worst = max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))
        print(
            f"  lm-eval hf, batch {batch}: {other['seconds']:.1f} s, {other['seconds'] / own['seconds']:.2f} x; same "
            f"answer to {equal} of {len(pairs)}, log-probabilities within {worst:.1e}"
        )
        best, same = min(best, other["seconds"]), same and equal == len(pairs) and worst < 1e-4
    speed = best / own["seconds"]
    print(f"  at its best {speed:.2f} x: {speed / own['ratio']:.2f} of the ratio of tokens (at least {WANTED} wanted)")
    return same and speed >= WANTED * own["ratio"]


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/eval", help="folder of the sets")
    parser.add_argument("--tasks", nargs="+", choices=tuple(SPLITS), default=list(SPLITS))
    parser.add_argument("--questions", type=int, default=80, help="of each set, for the time")
    parser.add_argument("--load", type=Path, help="Hugging Face folder with a tokenizer, instead of a random model")
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        run_side(args)
        return
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        model = args.load or Path(folder)
        if args.load is None:
            make_model(model, args.data)
        good = [compare(args, task, model) for task in args.tasks]
    raise SystemExit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
