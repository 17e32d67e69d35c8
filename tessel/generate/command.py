"""`tessel generate`: the prompts and what the model makes of them on stdout, everything else on stderr."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tessel.config.verbs import GenerateConfig
from tessel.generate.batch import generate_file
from tessel.generate.batcher import Batcher
from tessel.generate.beam import beam_search
from tessel.generate.load import Opened, open_for_use
from tessel.generate.prompts import Prompt, Prompter, beams_of, sampling_of, stop_ids_of, without_stop
from tessel.generate.request import Request
from tessel.generate.text import TextStream
from tessel.runtime import device as devices
from tessel.runtime.log import voice


def generate(cfg: GenerateConfig, given: frozenset[str] = frozenset()) -> None:
    """Continue each prompt, and say how fast; `given` names the fields that the user set.

    Raises:
        TesselError: no model, no tokenizer, or a prompt that the model cannot take.
    """
    together = cfg.output is not None
    with open_for_use(
        cfg.loading, cfg.tokenizer, cfg.launch, shape=cfg.model, given=given, together=together
    ) as opened:
        prompter = prompter_of(cfg, opened)
        drawing = cfg.drawing
        stops = stop_ids_of(drawing, opened.stop_ids | prompter.stop_ids(), opened.tokenizer)
        if cfg.output is not None:
            generate_file(cfg, opened, prompter, stops, _say)
            return
        prompts = [prompter(text, "--prompt") for text in cfg.prompt]
        for line in opened.notes:
            _say(line)
        _Terminal(cfg, opened, stops).show(prompts)


def prompter_of(cfg: GenerateConfig, opened: Opened) -> Prompter:
    """What makes ids of the prompts."""
    return Prompter.of(
        opened.tokenizer,
        opened.config,
        cfg.drawing.max_new_tokens,
        cfg.truncate_prompts,
        cfg.prompt_type,
        cfg.prompt_type_path,
        cfg.system,
    )


@dataclass
class _Terminal:
    """Prints prompts and what follows them, one after another."""

    cfg: GenerateConfig
    opened: Opened
    stop_ids: frozenset[int]

    def show(self, prompts: list[Prompt]) -> None:
        beams = beams_of(self.cfg.drawing)
        num_tokens, elapsed_s = 0, 0.0
        for number, prompt in enumerate(prompts):
            if prompt.cut_tokens:
                _say(f"the first {prompt.cut_tokens} tokens of prompt {number} were cut off to leave room")
            started_s = time.perf_counter()
            num_tokens += self._drawn(number, prompt) if beams is None else self._searched(number, prompt)
            elapsed_s += time.perf_counter() - started_s
        speed = num_tokens / elapsed_s if elapsed_s > 0 else 0.0
        _say(
            f"{num_tokens} tokens in {elapsed_s:.2f} s: {speed:.1f} tokens/s on {devices.describe(self.opened.device)}"
        )

    def _shown(self, number: int) -> str:
        """What stands before a continuation: the prompt, or nothing where it is a question in a template."""
        return self.cfg.prompt[number] if self.cfg.prompt_type is None else ""

    def _drawn(self, number: int, prompt: Prompt) -> int:
        drawing, num_samples = self.cfg.drawing, self.cfg.num_samples
        # Samples of one prompt compute it once.
        batcher = Batcher(
            self.opened.model,
            self.opened.tokenizer,
            device=self.opened.device,
            max_running=1,
            kept_tokens=len(prompt.ids) + drawing.max_new_tokens if num_samples > 1 else 0,
        )
        num_tokens = 0
        for sample in range(num_samples):
            index = number * num_samples + sample
            request = Request(
                prompt.ids,
                sampling_of(drawing),
                drawing.max_new_tokens,
                self.stop_ids,
                drawing.stop,
                drawing.seed + index,
            )
            if index:
                _print("\n")
            num_tokens += self._stream(batcher, request, self._shown(number))
        return num_tokens

    def _stream(self, batcher: Batcher, request: Request, shown: str) -> int:
        """Print a text as it grows, or when it is whole; returns the number of new tokens."""
        batcher.add(request)
        pieces = [shown]
        if not self.cfg.no_stream:
            _print(shown)
        num_tokens, finish = 0, None
        while finish is None:
            for event in batcher.step():
                num_tokens += event.token is not None
                finish = event.finish
                pieces.append(event.text)
                if not self.cfg.no_stream:
                    _print(event.text)
        _print("".join(pieces) + "\n" if self.cfg.no_stream else "\n")
        context = self.opened.config.max_position_embeddings
        if num_tokens == context - len(request.prompt_ids) + 1 < request.max_new_tokens:
            _say(f"stopped where the model's context of {context} tokens is full")
        return num_tokens

    def _searched(self, number: int, prompt: Prompt) -> int:
        options, drawing = beams_of(self.cfg.drawing), self.cfg.drawing
        assert options is not None
        beams = beam_search(
            self.opened.model,
            prompt.ids,
            options,
            max_new_tokens=drawing.max_new_tokens,
            sampling=sampling_of(drawing),
            stop_ids=self.stop_ids,
            seed=drawing.seed + number,
            device=self.opened.device,
        )
        for sample, beam in enumerate(beams[: self.cfg.num_samples]):
            if number or sample:
                _print("\n")
            stream = TextStream(self.opened.tokenizer, prompt.ids)
            pieces = [stream.push(token) for token in without_stop(beam.tokens, self.stop_ids)]
            _print("".join([self._shown(number), *pieces, stream.finish(), "\n"]))
        return sum(len(beam.tokens) for beam in beams[: self.cfg.num_samples])


def _print(text: str) -> None:
    """Text of the model; of several processes, one prints."""
    if voice.is_heard:
        print(text, end="", flush=True)


def _say(line: str) -> None:
    if voice.is_heard:
        print(line, file=sys.stderr, flush=True)
