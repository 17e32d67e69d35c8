"""`tessel generate --prompt-file IN --output OUT.jsonl`: many prompts together, a row for each text.

A row is written when its text has ended, so that an interrupted run goes on where it was: rows that are there are
kept, and at the end all are put into the order of the prompts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tessel.config.verbs import GenerateConfig
from tessel.errors import TesselError
from tessel.generate.batcher import Batcher
from tessel.generate.beam import beam_search
from tessel.generate.load import Opened
from tessel.generate.prompts import Prompt, Prompter, beams_of, sampling_of, without_stop
from tessel.generate.request import Event, Request
from tessel.generate.text import TextStream
from tessel.runtime import device as devices
from tessel.runtime.files import atomic_write, disk_errors, require_path
from tessel.runtime.log import progress, voice

# What a row of the output says beside what the prompt's own row does.
_OWN = ("index", "sample", "completion", "finish_reason", "prompt_tokens", "completion_tokens", "score", "logprobs")
Key = tuple[int, int]
"""(number of the prompt, number of the text of that prompt)."""


@dataclass
class _Text:
    """A text that is being made."""

    pieces: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


def generate_file(
    cfg: GenerateConfig, opened: Opened, prompter: Prompter, stop_ids: frozenset[int], say: Callable[[str], None]
) -> None:
    """Continue the prompts of a file, or of the command line, into `cfg.output`.

    Raises:
        TesselError: the file is no list of prompts, a prompt cannot be taken, or the output is of other prompts.
    """
    rows = read_prompts(cfg)
    output = Path(cfg.output or "")
    done = _read_done(output, rows, cfg)
    prompts = [prompter(prompt, _where(cfg, i)) for i, (_, prompt) in enumerate(rows)]
    keys = [(i, s) for i in range(len(rows)) for s in range(cfg.num_samples)]
    left = [key for key in keys if key not in done]
    # Alike long texts run together, and what is longest, so that the last ones are short.
    left.sort(key=lambda key: (-len(prompts[key[0]].ids), key))
    for line in opened.notes:
        say(line)
    num_cut = sum(prompt.cut_tokens > 0 for prompt in prompts)
    if num_cut:
        say(f"{num_cut} prompts are cut to their last tokens to leave room for new ones")
    if done:
        say(f"{len(done)} of {len(keys)} texts are in {output} already")
    work = _Work(cfg, opened, stop_ids, rows, prompts)
    started_s = time.perf_counter()
    with progress("generating", len(keys)) as bar, _appended(output) as file:
        bar.advance(len(done))
        texts = work.searched(left) if cfg.drawing.num_beams > 1 else work.drawn(left)
        for key, row in texts:
            done[key] = row
            _write(file, row)
            bar.advance(1, f"{work.num_tokens / max(time.perf_counter() - started_s, 1e-9):,.0f} tokens/s")
    elapsed_s = time.perf_counter() - started_s
    if voice.is_heard:
        with atomic_write(output) as temporary:
            temporary.write_text("".join(_line(done[key]) for key in keys), encoding="utf-8")
    speed = work.num_tokens / elapsed_s if elapsed_s > 0 else 0.0
    say(
        f"{work.num_tokens} tokens in {elapsed_s:.2f} s: {speed:.1f} tokens/s on {devices.describe(opened.device)}; "
        f"{len(keys)} texts in {output}"
    )


@dataclass
class _Work:
    """The texts that are left to make."""

    cfg: GenerateConfig
    opened: Opened
    stop_ids: frozenset[int]
    rows: Sequence[tuple[dict[str, Any], Any]]
    prompts: Sequence[Prompt]
    num_tokens: int = 0

    def drawn(self, keys: Sequence[Key]) -> Iterator[tuple[Key, dict[str, Any]]]:
        """Each text's row when it has ended."""
        cfg, drawing = self.cfg, self.cfg.drawing
        batcher = Batcher(
            self.opened.model, self.opened.tokenizer, device=self.opened.device, max_running=cfg.max_running
        )
        running: dict[int, tuple[Key, _Text]] = {}
        for key in keys:
            request = Request(
                self.prompts[key[0]].ids,
                sampling_of(drawing),
                drawing.max_new_tokens,
                self.stop_ids,
                drawing.stop,
                self._seed(key),
                cfg.logprobs,
            )
            running[batcher.add(request)] = key, _Text()
        while running:
            for event in batcher.step():
                key, text = running[event.request]
                text.pieces.append(event.text)
                if event.token is not None:
                    text.events.append(event)
                    self.num_tokens += 1
                if event.finish is not None:
                    del running[event.request]
                    yield key, self._row(key, "".join(text.pieces), len(text.events), event.finish, text.events)

    def searched(self, keys: Sequence[Key]) -> Iterator[tuple[Key, dict[str, Any]]]:
        """Each beam's row; the beams of a prompt come together."""
        options, drawing = beams_of(self.cfg.drawing), self.cfg.drawing
        assert options is not None
        for index in dict.fromkeys(index for index, _ in keys):
            beams = beam_search(
                self.opened.model,
                self.prompts[index].ids,
                options,
                max_new_tokens=drawing.max_new_tokens,
                sampling=sampling_of(drawing),
                stop_ids=self.stop_ids,
                seed=self._seed((index, 0)),
                device=self.opened.device,
            )
            for sample, beam in enumerate(beams[: self.cfg.num_samples]):
                if (index, sample) not in keys:
                    continue
                tokens = without_stop(beam.tokens, self.stop_ids)
                stream = TextStream(self.opened.tokenizer, self.prompts[index].ids)
                text = "".join([*(stream.push(token) for token in tokens), stream.finish()])
                self.num_tokens += len(tokens)
                finish = "stop" if len(tokens) < len(beam.tokens) else "length"
                yield (index, sample), self._row((index, sample), text, len(tokens), finish) | {"score": beam.score}

    def _seed(self, key: Key) -> int:
        return self.cfg.drawing.seed + key[0] * self.cfg.num_samples + key[1]

    def _row(self, key: Key, text: str, num_tokens: int, finish: str, events: Sequence[Event] = ()) -> dict[str, Any]:
        row = {
            **self.rows[key[0]][0],
            "index": key[0],
            "sample": key[1],
            "completion": text,
            "finish_reason": finish,
            "prompt_tokens": len(self.prompts[key[0]].ids),
            "completion_tokens": num_tokens,
        }
        if self.cfg.logprobs is not None:
            row["logprobs"] = [
                {"token": e.token, "logprob": e.logprob, "top": [list(entry) for entry in e.top]} for e in events
            ]
        return row


# ----------------------------------------------------------------------------------------- prompts


def read_prompts(cfg: GenerateConfig) -> list[tuple[dict[str, Any], Any]]:
    """Each prompt's own row, which the output keeps, and the prompt in it.

    A .txt has one a line, empty lines left out; a .jsonl has them under --prompt-key, or as `messages`.

    Raises:
        TesselError: a line is no JSON object, has no prompt, or a field that the output needs for its own.
    """
    if cfg.prompt_file is None:
        return [({cfg.prompt_key: text}, text) for text in cfg.prompt]
    path = require_path(cfg.prompt_file, "--prompt-file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TesselError(f"--prompt-file {path} is not UTF-8 ({error}). Convert it.") from error
    if path.suffix != ".jsonl":
        return [({cfg.prompt_key: line}, line) for line in (line.rstrip("\r") for line in lines) if line]
    return [_row_of(line, f"{path}, line {n}", cfg.prompt_key) for n, line in enumerate(lines, 1) if line.strip()]


def _row_of(line: str, where: str, key: str) -> tuple[dict[str, Any], Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TesselError(f"{where} is not JSON ({error}). Mend it.") from error
    if not isinstance(row, dict):
        raise TesselError(f"{where} is no JSON object. Write each prompt as one, such as {{{key!r}: ...}}.")
    name = key if key in row else "messages"
    if name not in row:
        raise TesselError(
            f"{where} has no field {key!r}; it has {', '.join(row) or 'none'}. Name it with --prompt-key."
        )
    taken = [own for own in _OWN if own in row]
    if taken:
        raise TesselError(f"{where} has a field {taken[0]!r}, which the output uses itself. Rename it.")
    return row, row[name]


def _where(cfg: GenerateConfig, index: int) -> str:
    return "--prompt" if cfg.prompt_file is None else f"{cfg.prompt_file}, prompt {index}:"


# ----------------------------------------------------------------------------------------- output


def _read_done(path: Path, rows: Sequence[tuple[dict[str, Any], Any]], cfg: GenerateConfig) -> dict[Key, Any]:
    """The rows of an earlier run. A last line that is not whole is left out."""
    if not path.exists():
        return {}
    done: dict[Key, Any] = {}
    content = path.read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
            index, sample = int(row["index"]), int(row["sample"])
            own = {name: value for name, value in row.items() if name not in _OWN}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TesselError(
                f"--output {path}, line {number}, is not a row of this verb, so nothing is added to it. Take another "
                "name, or move it away."
            ) from error
        if index >= len(rows) or own != rows[index][0]:
            raise TesselError(
                f"--output {path} holds texts of other prompts (its row {number} is of prompt {index}). Take another "
                "name, or move it away."
            )
        if sample < cfg.num_samples:
            done[index, sample] = row
    return done


@contextmanager
def _appended(path: Path) -> Iterator[TextIO | None]:
    """A file to add lines to, after its last whole one; None on processes that do not speak."""
    if not voice.is_heard:
        yield None
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        with open(path, "a", encoding="utf-8") as lines:
            yield lines


def _write(file: TextIO | None, row: dict[str, Any]) -> None:
    if file is not None:
        file.write(_line(row))
        file.flush()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
