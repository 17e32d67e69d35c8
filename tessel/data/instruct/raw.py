"""Raw dialogues as training data: preprocessed once into a cache, by content, tokenizer and options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tessel.config.finetune import FineTune
from tessel.config.preprocess import PreprocessConfig
from tessel.config.run import RunConfig
from tessel.data.encoding import Encoded, RowError
from tessel.data.indexed import optimal_dtype
from tessel.data.instruct.pai import PaiEncoder, chat_encoder
from tessel.data.instruct.shorten import IGNORED
from tessel.data.preprocess import Work, run_task
from tessel.data.raw_text import build_once, content_digest, default_cache_dir, num_workers_for
from tessel.data.readers import check_inputs
from tessel.data.rows import BadRow, Row, kind_of
from tessel.data.task import Task, task_of
from tessel.data.tokenizer import Tokenizer
from tessel.runtime.log import log

# Part of every key: to be raised when the same input would give other samples.
_VERSION = 1
_STEM = "dialogues"
_PREPROCESSING = (
    "handler_name", "prompt_type", "prompt_type_path", "enable_thinking", "reasoning_effort", "drop_thinking",
    "map_keys", "train_on_prompt", "mask_history", "pack", "neat_pack",
)  # fmt: skip
_QUESTIONS = ("instruction", "query")
_ANSWERS = ("output", "content", "response")


def preprocessed_dialogues(path: str, cfg: RunConfig, tokenizer: Tokenizer) -> str:
    """The bare prefix of what a file or folder of dialogues comes to; made if the cache has none.

    The prompt type is the tokenizer's own chat template if none is named. An entry appears whole; see
    `raw_text.build_once`.

    Raises:
        UsageError: the rows are of no known format, or there is no template.
        TesselError: the input cannot be read; names file and line or row.
    """
    wanted = cfg.finetune
    files = check_inputs([path], None)
    root = Path(cfg.data.data_cache_path or default_cache_dir()).expanduser()
    entry = root / "dialogues" / f"{_key(files, cfg, tokenizer)}-{Path(path).stem[:40]}"
    first = "chosen_input_ids" if wanted.is_pairwise_dataset else "input_ids"

    def build(folder: Path) -> None:
        task = _json_sft_task(cfg, tokenizer) if wanted.reads_pai else _instruction_task(path, cfg, tokenizer)
        run_task(task, files, folder / _STEM, tokenizer, Work(num_workers_for(files)))

    built = build_once(entry, f"{_STEM}_packed_{first}_document", build)
    log(f"{path}: " + (f"dialogues kept in {entry}" if built else f"preprocessed before, reused from {entry}"))
    return str(entry / _STEM)


def _key(files: Sequence[Path], cfg: RunConfig, tokenizer: Tokenizer) -> str:
    wanted = cfg.finetune
    parts = {
        "version": _VERSION,
        "content": [[file.suffix, content_digest(file)] for file in files],
        "tokenizer": tokenizer.identity,
        "kind": [wanted.is_instruction_dataset, wanted.is_pairwise_dataset, wanted.dataset],
        "seq_length": _longest(cfg),
        "options": {name: getattr(wanted, name) for name in _PREPROCESSING},
        "code": [content_digest(Path(name)) for name in _own_files(wanted)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _own_files(wanted: FineTune) -> list[str]:
    """Files of the user's that decide the samples, too."""
    names = [wanted.prompt_type_path or "", (wanted.handler_name or "").partition(".py:")[0] + ".py"]
    return [name for name in names if name and Path(name).is_file()]


def _longest(cfg: RunConfig) -> int:
    assert cfg.batch.seq_length is not None
    return cfg.finetune.max_padding_length or cfg.batch.seq_length


def _instruction_task(path: str, cfg: RunConfig, tokenizer: Tokenizer) -> Task:
    from tessel.data.instruct.detect import with_handler

    options = {name: getattr(cfg.finetune, name) for name in _PREPROCESSING}
    if options["prompt_type"] is None and options["prompt_type_path"] is None:
        options["prompt_type"] = "hf"
        log("--prompt-type is not given: dialogues are written by the tokenizer's own chat template (hf)")
    asked = PreprocessConfig(
        input=(path,), output_prefix="", seq_length=cfg.batch.seq_length, tokenizer=cfg.tokenizer, **options
    )
    return task_of(with_handler(asked), tokenizer)


def _json_sft_task(cfg: RunConfig, tokenizer: Tokenizer) -> Task:
    encoder = JsonEncoder(chat_encoder(tokenizer, _longest(cfg)))
    return Task(encoder, optimal_dtype(None), options={"dataset": "JSON-SFT"})


class JsonEncoder:
    """A `RowEncoder`: raw JSON as Pai-Megatron-Patch's JSON-SFT reads it.

    The question is `instruction` or `query` with `input`, the answer `output`, `content` or `response`. A question
    that leaves no room is left out, and a longer answer cut.
    """

    outputs = ("packed_input_ids", "packed_attention_mask", "packed_labels")
    columns = None

    def __init__(self, chat: PaiEncoder) -> None:
        self._chat = chat
        self.left_out: list[BadRow] = []

    def __call__(self, rows: Sequence[Row], where: str) -> tuple[Encoded, ...]:
        """Ids, ones, and labels that are not shifted, a sequence and a document a row.

        Raises:
            RowError: a row is no dialogue.
        """
        room = self._chat.seq_length
        pairs = [self._chat.texts(row, self._question(row), _text(row, _ANSWERS)) for row in rows]
        self.left_out = []
        ids: list[np.ndarray] = [np.zeros(0, np.int32)]
        labels: list[np.ndarray] = [np.zeros(0, np.int32)]
        for row, (question, whole) in zip(rows, self._chat.encode(pairs), strict=True):
            self._chat.check_prefix(row, question, whole)
            if len(question) >= room:
                self.left_out.append(BadRow(row.number, f"the question has {room} tokens or more"))
                continue
            ids.append(whole[:room])
            labels.append(np.where(np.arange(len(ids[-1])) < len(question), IGNORED, ids[-1]).astype(np.int32))
        lengths = np.array([len(each) for each in ids[1:]], np.int32)
        tokens, ones = np.concatenate(ids), np.ones(len(lengths), np.int32)
        return tuple(
            Encoded(flat, lengths, ones) for flat in (tokens, np.ones(len(tokens), np.int32), np.concatenate(labels))
        )

    def _question(self, row: Row) -> str:
        more = row.values.get("input")
        return _text(row, _QUESTIONS) + (more if isinstance(more, str) else "")


def _text(row: Row, names: Sequence[str]) -> str:
    name = next((name for name in names if name in row.values), None)
    if name is None:
        raise RowError(row.number, f"the object has none of {', '.join(names)}.")
    value = row.values[name]
    if not isinstance(value, str):
        raise RowError(row.number, f"{name!r} is {kind_of(value)}, where text is expected.")
    return value
