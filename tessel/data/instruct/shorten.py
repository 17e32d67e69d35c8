"""How a sample that is longer than --seq-length is cut: turn by turn, prompts and answers in proportion.

Source of the rules: MindSpeed-LLM's DecoderPackedMTFDataset, which follows LLaMA-Factory's `infer_seqlen`.
"""

from __future__ import annotations

import numpy as np

IGNORED = -100
"""The label of a token without loss, in files."""


def shares_of(num_prompt: int, num_answer: int, room: int) -> tuple[int, int]:
    """Tokens that a prompt and its answer keep of `room`: a short one of them is kept whole if it can be."""
    if num_answer * 2 < room:
        most_answer = room
    elif num_prompt * 2 < room:
        most_answer = room - num_prompt
    else:
        most_answer = int(room * (num_answer / (num_prompt + num_answer)))
    kept_answer = min(most_answer, num_answer)
    return min(max(room - kept_answer, 0), num_prompt), kept_answer


def turns_of(labels: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, end of the prompt, end of the answer) of each turn: a run of ignored labels and what follows it.

    Trained tokens before the first prompt are a turn with an empty prompt.
    """
    if not len(labels):
        return []
    ignored = labels == IGNORED
    changes = np.flatnonzero(ignored[1:] != ignored[:-1]) + 1
    edges = [0, *changes.tolist(), len(labels)]
    if not ignored[0]:
        edges.insert(0, 0)
    if len(edges) % 2 == 0:  # ends with a prompt
        edges.append(len(labels))
    return [(edges[i], edges[i + 1], edges[i + 2]) for i in range(0, len(edges) - 2, 2)]


def kept_by_turns(labels: np.ndarray, room: int, ends_with_eos: bool = False) -> np.ndarray:
    """i64[n], n <= room: the positions of a sample that are kept, of labels [N] that are not shifted.

    `ends_with_eos`: of a template whose turns end with the first token of the next prompt (efficient_eos), so
    that this token belongs to the answer and the last one is kept always.
    """
    if len(labels) <= room:
        return np.arange(len(labels))
    kept = []
    used = int(ends_with_eos)
    for first, answer, end in turns_of(labels[:-1] if ends_with_eos else labels):
        if used >= room:
            break
        num_prompt, num_answer = shares_of(answer - first, end - answer, room - used)
        used += num_prompt + num_answer
        kept += [np.arange(first, first + num_prompt), np.arange(answer, answer + num_answer)]
    if ends_with_eos:
        kept.append(np.array([len(labels) - 1]))
    return np.concatenate(kept).astype(np.int64)[:room]


def pair_shares(chosen_labels: np.ndarray, num_chosen: int, num_rejected: int, room: int) -> tuple[int, int, int]:
    """(tokens of the prompt that both rows have, how many of them and of the answers are kept).

    The prompt ends at the first trained token of the chosen row; the longer answer decides the shares.
    """
    trained = np.flatnonzero(chosen_labels != IGNORED)
    num_prompt = int(trained[0]) if len(trained) else num_chosen
    kept_prompt, kept_answer = shares_of(num_prompt, max(num_chosen, num_rejected) - num_prompt, room)
    return num_prompt, kept_prompt, kept_answer
