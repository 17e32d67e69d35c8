"""Dialogues to ids and labels, many at once.

Labels are the ids that are trained and -100 elsewhere, aligned with the ids (the model shifts them).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tessel.data.instruct import deepseek4
from tessel.data.instruct.chat import ChatRenderer
from tessel.data.instruct.cuts import cut_turns
from tessel.data.instruct.dialogue import ANSWERING, Dialogue, Example
from tessel.data.instruct.rendering import Rendered, Renderer, RenderOptions
from tessel.data.instruct.shorten import IGNORED
from tessel.data.instruct.slots import Layout, Piece, check_turns, has_thought, without_thoughts
from tessel.data.instruct.templates import DEEPSEEK4, HF, REASONING, Template, find_template
from tessel.data.instruct.vocabulary import Vocabulary, vocabulary_for
from tessel.data.tokenizer import Tokenizer

Turn = tuple[Sequence[Piece], Sequence[Piece]]
"""A question and its answer."""


class SlotRenderer:
    """A template of slots, each of them tokenized alone."""

    def __init__(self, template: Template, vocabulary: Vocabulary, options: RenderOptions) -> None:
        self.template = template
        self.vocabulary = vocabulary
        self.options = options
        self._layout = Layout(template, vocabulary)

    def dialogues(self, dialogues: Sequence[Dialogue]) -> list[Rendered]:
        """See `Renderer`."""
        sheet = _Sheet()
        for dialogue in dialogues:
            self._add(sheet, self._turns(dialogue), self.options.mask_history)
        return sheet.render(self.vocabulary, self.template, self.options)

    def preferences(self, examples: Sequence[Example]) -> list[Rendered]:
        """See `Renderer`. Both answers follow the prompt as it is cut for the chosen one."""
        sheet = _Sheet()
        for example in examples:
            chosen = self._pair_turns(example.dialogue(0))
            rejected = self._pair_turns(example.dialogue(1))
            self._add(sheet, chosen, mask_history=True)
            self._add(sheet, [*chosen[:-1], (chosen[-1][0], rejected[-1][1])], mask_history=True, follows=True)
        return sheet.render(self.vocabulary, self.template, self.options)

    def prompts(self, dialogues: Sequence[Dialogue]) -> list[np.ndarray]:
        """See `Renderer`. Without thinking, the empty thought is part of the prompt."""
        sheet = _Sheet()
        for dialogue in dialogues:
            sheet.begin()
            if self.template.kind == DEEPSEEK4:
                sheet.end(deepseek4.prompt(dialogue, self.options))
                continue
            check_turns(dialogue, asks=True)
            reasoning = self.template.kind == REASONING
            if reasoning and self.options.thinking is False:
                dialogue = without_thoughts(dialogue, self.template, range(1, len(dialogue.messages), 2))
            pieces = self._layout.messages(dialogue)
            if reasoning and self.options.thinking is False:
                pieces[-1] = [*pieces[-1], "".join(self.template.thought_words)]
            for message in pieces:
                sheet.add(message, trained=False)
            sheet.end([])
        return [rendered.ids for rendered in sheet.render(self.vocabulary, self.template, RenderOptions())]

    def asked(self, dialogues: Sequence[Dialogue], with_answers: bool) -> list[np.ndarray]:
        """i32 ids of what is asked in whole dialogues, cut as these are, by MindSpeed-LLM's rules of prompts.

        All questions, joined; `with_answers`, with the answers between them.
        """
        sheet = _Sheet()
        for dialogue in dialogues:
            sheet.begin()
            for question, answer in self._turns(dialogue):
                sheet.add_turn(question, answer)
            sheet.end([])
        result = []
        for ids, labels in sheet.render(self.vocabulary, self.template, self.options):
            of_question = labels == IGNORED
            end = int(np.flatnonzero(of_question)[-1]) + 1 if of_question.any() else 0
            result.append(ids[:end] if with_answers else ids[of_question])
        return result

    def _turns(self, dialogue: Dialogue) -> Sequence[Turn]:
        """Question and answer of each turn; thoughts by LLaMA-Factory's ReasoningTemplate."""
        if self.template.kind == DEEPSEEK4:
            return deepseek4.turns(dialogue, self.options)
        check_turns(dialogue)
        template, thinking = self.template, self.options.thinking
        reasoning = template.kind == REASONING
        answers = range(1, len(dialogue.messages), 2)
        if reasoning and thinking is False:
            dialogue = without_thoughts(dialogue, template, answers)
        elif reasoning and self.options.drop_thinking:
            dialogue = without_thoughts(dialogue, template, answers[:-1])
        pieces = self._layout.messages(dialogue)
        for i in answers if reasoning else ():
            if not has_thought(dialogue.messages[i], template, self.options.exact_thoughts):
                self._put_empty_thought(pieces, i)
        return [(pieces[i - 1], pieces[i]) for i in answers]

    def _put_empty_thought(self, pieces: list[list[Piece]], answer: int) -> None:
        """At the end of the question, not trained, unless thinking is asked for; then before the answer, trained."""
        empty = "".join(self.template.thought_words)
        if self.options.thinking:
            pieces[answer] = [empty, *pieces[answer]]
        else:
            pieces[answer - 1] = [*pieces[answer - 1], empty]

    def _pair_turns(self, dialogue: Dialogue) -> Sequence[Turn]:
        """As `_turns`, but earlier answers lose their thoughts: LLaMA-Factory's encode_oneturn."""
        if self.template.kind == DEEPSEEK4:
            return deepseek4.last_turn(dialogue, self.options)
        check_turns(dialogue)
        template = self.template
        reasoning = template.kind == REASONING
        answers = range(1, len(dialogue.messages), 2)
        if reasoning:
            gone = answers if self.options.thinking is False else answers[:-1]
            dialogue = without_thoughts(dialogue, template, gone)
        pieces = self._layout.messages(dialogue)
        if reasoning and not has_thought(dialogue.messages[-1], template, self.options.exact_thoughts):
            self._put_empty_thought(pieces, answers[-1])
        return [(pieces[i - 1], pieces[i]) for i in answers]

    def _add(
        self,
        sheet: _Sheet,
        turns: Sequence[Turn],
        mask_history: bool,
        follows: bool = False,
    ) -> None:
        options, template = self.options, self.template
        sheet.begin(follows)
        for i, (question, answer) in enumerate(turns):
            trains_answer = not mask_history or i == len(turns) - 1
            first, middle = sheet.add_turn(question, answer, options.train_on_prompt, trains_answer)
            if template.efficient_eos and i and not options.train_on_prompt and not mask_history:
                sheet.train_as_eos(first, middle)
        end: list[Piece] = []
        if template.efficient_eos and self.vocabulary.eos is not None:
            end.append(self.vocabulary.eos)
        if options.append_eod and self.vocabulary.eod is not None:
            end.append(self.vocabulary.eod)
        sheet.end(end)


class _Sheet:
    """Dialogues as segments, each a text or an id, trained or not; each text is tokenized once.

    A turn is (first segment, first of the answer, end).
    """

    def __init__(self) -> None:
        self._index: dict[Piece, int] = {}
        self._keys: list[int] = []
        self._trained: list[bool] = []
        self._as_eos: list[tuple[int, int]] = []
        self._turns: list[list[tuple[int, int, int]]] = []
        self._starts: list[int] = []
        self._follows: list[bool] = []

    def begin(self, follows: bool = False) -> None:
        """Begin a dialogue; if it `follows`, its prompt is cut as that of the one before."""
        self._starts.append(len(self._keys))
        self._turns.append([])
        self._follows.append(follows)

    def add(self, pieces: Sequence[Piece], trained: bool) -> None:
        """Add segments."""
        index = self._index
        for piece in pieces:
            self._keys.append(index.setdefault(piece, len(index)))
            self._trained.append(trained)

    def add_turn(
        self,
        question: Sequence[Piece],
        answer: Sequence[Piece],
        trains_question: bool = False,
        trains_answer: bool = True,
    ) -> tuple[int, int]:
        """Add a turn; its first segment and the first of its answer."""
        first = len(self._keys)
        self.add(question, trains_question)
        middle = len(self._keys)
        self.add(answer, trains_answer)
        self._turns[-1].append((first, middle, len(self._keys)))
        return first, middle

    def train_as_eos(self, first: int, end: int) -> None:
        """The first token of these segments is trained to be the end of sequence."""
        self._as_eos.append((first, end))

    def end(self, pieces: Sequence[Piece]) -> None:
        """Close the dialogue with ids that no cut takes away."""
        self.add(pieces, trained=True)

    def render(self, vocabulary: Vocabulary, template: Template, options: RenderOptions) -> list[Rendered]:
        """The dialogues in their order."""
        tokens, starts, lengths = self._encode(vocabulary)
        keys = np.array(self._keys, np.int64)
        segment_starts, segment_lengths = starts[keys], lengths[keys]
        bounds = np.array([*self._starts, len(keys)], np.int64)
        offsets = np.concatenate([[0], np.cumsum(segment_lengths)])
        totals = offsets[bounds[1:]] - offsets[bounds[:-1]]
        most = options.max_tokens
        too_long = [d for d in np.flatnonzero(totals >= most).tolist() if self._turns[d]] if most is not None else []
        if too_long:
            too_long = sorted({*too_long, *(d + 1 for d in too_long if self._is_followed(d))})
            for d in too_long:
                before = self._turns[d - 1] if self._follows[d] else None
                cut_turns(segment_lengths, self._turns[d], before, template, options)
            offsets = np.concatenate([[0], np.cumsum(segment_lengths)])
        where = np.repeat(segment_starts - offsets[:-1], segment_lengths) + np.arange(offsets[-1])
        ids = tokens[where]
        labels = np.where(np.repeat(np.array(self._trained, bool), segment_lengths), ids, np.int32(IGNORED))
        if self._as_eos:
            at = offsets[np.array(self._as_eos)]
            # A question that was cut away whole has no first token.
            labels[at[at[:, 0] < at[:, 1], 0]] = vocabulary.eos
        cuts = offsets[bounds].tolist()
        return [Rendered(ids[a:b], labels[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]

    def _is_followed(self, d: int) -> bool:
        return d + 1 < len(self._follows) and self._follows[d + 1]

    def _encode(self, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All tokens i32, and where those of each key start and how many they are (i64)."""
        texts = [piece for piece in self._index if isinstance(piece, str)]
        tokens, text_lengths = vocabulary.encoder.encode_flat(texts)
        lengths = np.ones(len(self._index), np.int64)
        is_text = np.fromiter((isinstance(piece, str) for piece in self._index), bool, len(self._index))
        lengths[is_text] = text_lengths
        starts = np.empty(len(self._index), np.int64)
        starts[is_text] = np.cumsum(text_lengths, dtype=np.int64) - text_lengths
        ids = [piece for piece in self._index if isinstance(piece, int)]
        starts[~is_text] = len(tokens) + np.arange(len(ids))
        return np.concatenate([tokens, np.array(ids, np.int32)]), starts, lengths


def renderer_for(
    tokenizer: Tokenizer,
    prompt_type: str | None,
    path: str | None = None,
    options: RenderOptions | None = None,
    as_mindspeed: bool = False,
) -> Renderer:
    """The renderer of --prompt-type: a template, or `hf`, the tokenizer's own chat template.

    Raises:
        UsageError, TesselError: see `find_template`, `vocabulary_for` and `ChatRenderer`.
    """
    options = options if options is not None else RenderOptions()
    if prompt_type == HF and path is None:
        return ChatRenderer(tokenizer, options)
    template = find_template(prompt_type, path, as_mindspeed)
    return SlotRenderer(template, vocabulary_for(tokenizer, template), options)


def render_prompt(dialogue: Dialogue, renderer: Renderer) -> list[int]:
    """Ids of everything up to where the assistant answers; `dialogue` ends with a question."""
    if not dialogue.messages or dialogue.messages[-1].role in ANSWERING:
        raise ValueError("a prompt ends with a question")
    ids: list[int] = renderer.prompts([dialogue])[0].tolist()
    return ids
