"""`tessel evaluate --harness`: tasks of lm-evaluation-harness 0.4, with a model of tessel's.

Requests get what its `--model hf` gives them: the same ids, truncated alike, the same log-softmax, the same ends of
texts. Beginnings that requests share are computed once.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
    make_table,
)
from torch import distributed

from tessel.config.evaluate import EvaluateConfig
from tessel.config.nearest import nearest
from tessel.errors import TesselError, UsageError
from tessel.evaluate.answers import continued
from tessel.evaluate.harness_data import data_dirs, write_leaves
from tessel.evaluate.harness_index import index_of
from tessel.evaluate.replica import Replica
from tessel.evaluate.results import RESULTS
from tessel.evaluate.scorer import Scorer
from tessel.generate.load import Opened
from tessel.generate.request import Request
from tessel.generate.sampling import GREEDY, Sampling
from tessel.runtime.files import atomic_write
from tessel.runtime.log import log, progress

_DEFAULT_NEW_TOKENS = 256
_NO_QUESTIONS = "did not find any docs"
_Pair = tuple[tuple[str, str], list[int], list[int]]


def run_harness(cfg: EvaluateConfig, opened: Opened) -> None:
    """Evaluate the tasks of a checked configuration; the table on stdout, results and samples in --output.

    Raises:
        UsageError: an unknown task.
        TesselError: a folder of --data-dir has none of the task's files, a data set is not on this machine, or there
            are more copies of the model than questions.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = data_dirs(cfg.data_dir)
    if folders:  # what is not in them must not be looked for elsewhere
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="tessel-harness-") as leaves:
        manager = index_of([*cfg.task, *folders])
        if folders:
            known = {name: entry.yaml_path for name, entry in manager.task_index.items() if entry.yaml_path is not None}
            write_leaves(Path(leaves), folders, known)
            manager.task_index.update(TaskManager(include_defaults=False, include_path=leaves).task_index)
        _check_tasks(cfg.task, manager)
        try:
            found = simple_evaluate(
                model=HarnessModel(opened, cfg.batch_size),
                tasks=list(cfg.task),
                num_fewshot=cfg.num_fewshot,
                limit=cfg.limit,
                task_manager=manager,
                bootstrap_iters=0,
                confirm_run_unsafe_code=cfg.allow_code_execution,
                apply_chat_template=cfg.prompt_type == "hf",
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise TesselError(
                f"lm-evaluation-harness finds no data set of {', '.join(cfg.task)} on this machine ({error}). Give its "
                "folder with --data-dir TASK=DIR."
            ) from error
        except ValueError as error:
            if _NO_QUESTIONS not in str(error):
                raise
            raise TesselError(
                f"A task of {', '.join(cfg.task)} has fewer questions than there are copies of the model that share "
                "them out, or none. Give more (--limit), or start fewer processes."
            ) from error
    if found is not None:
        _show(found, cfg.output)


def _check_tasks(names: Sequence[str], manager: TaskManager) -> None:
    for name in names:
        if not manager.match_tasks([name]):
            near = nearest(name, manager.all_tasks)
            raise UsageError(
                f"--task {name}: lm-evaluation-harness has no such task; "
                f"{'nearest: ' + ', '.join(near) if near else 'lm-eval ls tasks lists them'}."
            )


def _show(found: dict[str, Any], output: str | None) -> None:
    log(make_table(found))
    if found.get("groups"):
        log(make_table(found, "groups"))
    if output is None:
        return
    samples = found.pop("samples", {})
    folder = Path(output)
    with atomic_write(folder / RESULTS) as temporary:
        temporary.write_text(_json(found, indent=1) + "\n", encoding="utf-8")
    for task, rows in samples.items():
        with atomic_write(folder / f"samples_{task}.jsonl") as temporary:
            temporary.write_text("".join(_json(row) + "\n" for row in rows), encoding="utf-8")


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, default=handle_non_serializable, indent=indent)


class HarnessModel(TemplateLM):
    """A model opened by tessel, as the harness calls it."""

    def __init__(self, opened: Opened, batch_size: int) -> None:
        super().__init__()
        self._opened, self._batch_size = opened, batch_size
        self._encode = opened.tokenizer.batch_encoder()
        self._encode_plain = opened.tokenizer.batch_encoder(add_special_tokens=False)
        self._scorer = Scorer(opened.model, opened.device, batch_size)
        self._device = opened.device
        self.tokenizer = getattr(opened.tokenizer, "hf", None)
        replica = Replica.of(opened.topology, opened.processes.world.rank)
        self._rank, self._world_size = replica.number, replica.num_replicas
        self._group = self._replicas() if self._world_size > 1 else None

    @property
    def counts(self) -> Any:
        """Tokens that were computed for log-probabilities."""
        return self._scorer.counts

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        eod = self._opened.tokenizer.eod
        if eod is None:
            raise TesselError("The tokenizer has no end-of-text token, which the task needs. Name one in its files.")
        return eod

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self._opened.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self._opened.tokenizer.identity

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; without a second beginning-of-text token where it has one."""
        plain = add_special_tokens is False
        if add_special_tokens is None and self.tokenizer is not None:
            plain = has_bos_prefix(string, self._opened.tokenizer.decode([self.prefix_token_id]))
        return (self._encode_plain if plain else self._encode)([string])[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text, by the tokenizer's template."""
        if self.tokenizer is None:
            raise TesselError("The tokenizer has no chat template: leave out --prompt-type hf.")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(self, requests: list[_Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with progress("scoring", len(requests)) as bar:
            for number, score in self._scorer.scores((context, answer) for _, context, answer in requests):
                scores[number] = (score.logprob, score.is_greedy)
                bar.advance()
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln P of whole texts, in pieces of the context's length."""
        pieces: list[_Pair] = []
        owners = []
        for number, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, answer in map(make_disjoint_window, windows):
                pieces.append((("", ""), context, answer))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of its strings."""
        tokenizer = self._opened.tokenizer
        eos = tokenizer.decode([self.eot_token_id])
        asked, ends = [], []
        for number, request in enumerate(requests):
            context, options = request.args
            options = normalize_gen_kwargs(options, _DEFAULT_NEW_TOKENS)
            until = handle_stop_sequences(options.get("until"), eos=eos)
            ends.append(until)
            asked.append(self._request(context, options, until, number))
        texts = [""] * len(requests)
        with progress("generating", len(requests)) as bar:
            for number, tokens, _ in continued(self._opened, asked, self._batch_size):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                texts[number] = postprocess_generated_text(text, ends[number], None)
                bar.advance()
        return texts

    def _request(self, context: str, options: Any, until: Sequence[str], seed: int) -> Request:
        most = int(options["max_gen_toks"])
        room = self.max_length - most
        if room <= 0:
            raise TesselError(
                f"A task asks for {most} new tokens, and the model's context (max_position_embeddings) has "
                f"{self.max_length}. Take a model with a longer one."
            )
        sampling = GREEDY
        if options.get("do_sample"):
            sampling = Sampling(
                greedy=False,
                temperature=float(options.get("temperature") or 1.0),
                top_k=int(options.get("top_k") or 0),
                top_p=float(options.get("top_p") or 1.0),
            )
        stop_ids = self._opened.stop_ids | {self.eot_token_id}
        return Request(tuple(self.tok_encode(context)[-room:]), sampling, most, stop_ids, tuple(until), seed)

    # ------------------------------------------------------------------------------------- several replicas

    def _replicas(self) -> distributed.ProcessGroup | None:
        """The processes that hold the same part of each replica."""
        rank, own = self._opened.processes.world.rank, None
        for ranks in self._opened.topology.groups("dp"):
            group = distributed.new_group(ranks, backend="gloo")
            own = group if rank in ranks else own
        return own

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A number of each replica."""
        if self._group is None:
            return tensor
        parts = [torch.zeros_like(tensor.cpu()) for _ in range(self._world_size)]
        distributed.all_gather(parts, tensor.cpu(), group=self._group)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """An object of each replica, on replica `dst`."""
        if self._group is None:
            return [obj]
        parts: list[Any] = [None] * self._world_size
        distributed.all_gather_object(parts, obj, group=self._group)
        return parts if self._rank == dst else None

    def barrier(self) -> None:
        """All replicas have come here."""
        if self._group is not None:
            self._opened.processes.meet("the requests of a task are answered")
