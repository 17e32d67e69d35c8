"""Tensors that several ranks' files hold alike: the way back reads one of them, so the others are proved here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tessel.checkpoint import torch_file
from tessel.checkpoint.stored import PlannedFile, StoredModel, StoredTensor
from tessel.checkpoint.torch_file import LoadedTensor
from tessel.convert.compare import Difference, digest_of_tensor
from tessel.convert.plan import Plan
from tessel.convert.show import names_of, origin

_FORMATS = ("torch", "legacy")


def wrong_copies(plan: Plan, source: StoredModel, folder: Path) -> tuple[list[Difference], int]:
    """Copies that are not what was planned, and how many copies there are."""
    if plan.format not in _FORMATS:
        return [], 0
    wrong: list[Difference] = []
    count = 0
    for file, copies in _copies(plan, source):
        content = torch_file.load(folder / file.name)
        for key, tensor in copies.items():
            count += 1
            kept, _, rest = key.partition(":")
            found = _find(content.get(kept), rest)
            if found is None or _differs(tensor, found, folder / file.name):
                wrong.append(Difference(f"{file.name}: {key}", "is not as planned"))
    return wrong, count


def _copies(plan: Plan, source: StoredModel) -> Iterator[tuple[PlannedFile, dict[str, StoredTensor]]]:
    """Of each file, the tensors that are made of the same boxes as one before."""
    names = names_of(source)
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for file in plan.files:
        copies = {}
        for key, tensor in file.tensors.items():
            own = (origin(tensor, names, source.folder), tensor.shape)
            if own in seen:
                copies[key] = tensor
            seen.add(own)
        if copies:
            yield file, copies


def _find(state: Any, key: str) -> Tensor | None:
    """The tensor under a dotted key, where dictionaries may lie in one another."""
    if not isinstance(state, Mapping):
        return None
    if isinstance(state.get(key), Tensor):
        return state[key]  # type: ignore[no-any-return]
    for at, letter in enumerate(key):
        if letter == "." and key[:at] in state:
            found = _find(state[key[:at]], key[at + 1 :])
            if found is not None:
                return found
    return None


def _differs(planned: StoredTensor, found: Tensor, path: Path) -> bool:
    if tuple(found.shape) != planned.shape or found.dtype != planned.dtype:
        return True
    return digest_of_tensor(planned) != digest_of_tensor(LoadedTensor(planned.name, path, found))
