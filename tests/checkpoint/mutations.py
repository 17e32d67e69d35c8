"""Damage to the files of a checkpoint: of their bytes, of what a JSON file says, and of what a pickle holds."""

from __future__ import annotations

import argparse
import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch

_STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**30, 0.5, -1.5, float("nan"), float("inf"), "", "x", "0",
    "../x", b"x", [], [None], ["x"], [-1, 2], {}, {"x": 1}, {1: 2}, (), (1, "x"), "9" * 200, "\0",
)  # fmt: skip
_DTYPES = (torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool)


def of_bytes(whole: bytes, numbers: random.Random) -> bytes:
    """Cut, flipped, swapped, doubled, emptied, or with a huge number in it; mostly near the ends, where headers are."""
    data = bytearray(whole)
    if not data:
        return b"\0"
    size = len(data)
    low, high = numbers.choice(((0, size), (0, min(size, 4096)), (max(size - 4096, 0), size)))
    kind = numbers.choice(("cut", "swap", "huge", "flip", "flip", "flip", "double", "zero"))
    at, length = numbers.randrange(low, high), numbers.randrange(1, 64)
    if kind == "cut":
        return bytes(data[:at])
    if kind == "swap":
        other = numbers.randrange(low, high)
        data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
    elif kind == "huge":
        number = numbers.choice((2**63 - 1, 2**64 - 1, 2**40, 2**31, size * 3))
        data[at : at + 8] = struct.pack("<Q", number)
    elif kind == "double":
        data[at:at] = data[at : at + length]
    elif kind == "zero":
        data[at : at + length] = bytes(length)
    else:
        for _ in range(numbers.randint(1, 5)):
            data[numbers.randrange(low, high)] = numbers.randrange(256)
    return bytes(data)


def of_archive(whole: bytes, numbers: random.Random) -> bytes:
    """A file of torch.save whose pickle is damaged, with sums that are right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(made, "w") as out:
        for entry in archive.infolist():
            content = archive.read(entry)
            is_pickle = entry.filename.endswith("data.pkl")
            out.writestr(entry.filename, of_bytes(content, numbers) if is_pickle else content)
    return made.getvalue()


def of_json(whole: bytes, numbers: random.Random) -> bytes:
    """A JSON file that says something else in one place."""
    changed = changed_value(json.loads(whole), numbers)
    return json.dumps(changed, default=str).encode()


def of_safetensors(whole: bytes, numbers: random.Random) -> bytes:
    """A safetensors file whose header says something else in one place."""
    (size,) = struct.unpack("<Q", whole[:8])
    header = of_json(whole[8 : 8 + size], numbers)
    return struct.pack("<Q", len(header)) + header + whole[8 + size :]


def of_content(whole: bytes, numbers: random.Random) -> bytes:
    """A file of torch.save that holds something else in one place."""
    content = torch.load(io.BytesIO(whole), weights_only=False)
    made = io.BytesIO()
    torch.save(changed_value(content, numbers), made)
    return made.getvalue()


def changed_value(value: Any, numbers: random.Random) -> Any:
    """A copy with one value, key or tensor in it changed or gone; each level is as likely as the next."""
    if isinstance(value, argparse.Namespace):
        value = copy.copy(value)
        vars(value).update(_changed_items(vars(value), numbers))
        return value
    if isinstance(value, Mapping) and value and numbers.random() < 0.9:
        return _changed_items(value, numbers)
    if isinstance(value, list | tuple) and value and numbers.random() < 0.8:
        items = list(value)
        at = numbers.randrange(len(items))
        items[at] = changed_value(items[at], numbers)
        return type(value)(items) if type(value) in (list, tuple) else items
    if isinstance(value, torch.Tensor) and numbers.random() < 0.8:
        return _changed_tensor(value, numbers)
    return numbers.choice(_STRANGE)


def _changed_items(items: Mapping[Any, Any], numbers: random.Random) -> dict[Any, Any]:
    made = dict(items)
    key = numbers.choice(list(made))
    kind = numbers.choice(("change", "change", "change", "drop", "rename", "add"))
    if kind == "change":
        made[key] = changed_value(made[key], numbers)
    elif kind == "add":
        made[numbers.choice(("x", 1, None, "../x", key))] = numbers.choice(_STRANGE)
    else:
        value = made.pop(key)
        if kind == "rename":
            made[numbers.choice((f"{key}x", str(key)[:-1], 7, f"{key}.0"))] = value
    return made


def _changed_tensor(tensor: torch.Tensor, numbers: random.Random) -> torch.Tensor:
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: tensor.to(numbers.choice(_DTYPES)),
        lambda: tensor.reshape(-1),
        lambda: tensor[None],
        lambda: tensor.reshape(-1)[:1],
        lambda: tensor.new_zeros(()),
        lambda: tensor.new_zeros((0, *tensor.shape[1:])),
        lambda: tensor.new_zeros(1).expand(tensor.shape),
        lambda: tensor.transpose(0, -1) if tensor.dim() else tensor,
    ]
    return numbers.choice(ways)()
