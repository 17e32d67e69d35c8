"""A source and a plan in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from tessel.checkpoint.stored import (
    Assembled,
    Cast,
    Derived,
    PaddedRows,
    StoredModel,
    StoredTensor,
    Transposed,
    bounds,
    degrees_text,
    name_of,
)
from tessel.convert.plan import Plan, size_of

_MAX_PIECES = 6
Box = list[tuple[int, int]]


def bytes_text(num_bytes: int) -> str:
    """A size in the largest decimal unit that leaves at least 1."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def source_lines(source: StoredModel) -> Iterator[str]:
    """What was found, and what had to be guessed or stays behind."""
    num_parameters = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    words = [
        source.config.family,
        f"{num_parameters:,} parameters",
        "/".join(name_of(dtype) for dtype in source.dtypes),
    ]
    degrees = degrees_text(source.degrees)
    if source.format not in ("hf", "torch_dcp"):
        words.append(degrees or "one rank")
    if source.iteration is not None:
        words.append(f"iteration {source.iteration}")
    yield f"from {source.folder}: {source.format}, {', '.join(words)}"
    for kind, lines in (("guessed", source.guessed), ("note", source.notes), ("left out", source.left_out)):
        for line in lines:
            yield f"  {kind}: {line}"
    if source.optimizer:
        what = sorted({name.partition(".")[0] for name in source.optimizer})
        yield f"  optimizer: {', '.join(what)}"


def target_line(plan: Plan, save: Path) -> str:
    """What will be written."""
    target = plan.target
    etp = target.tp if target.etp is None else target.etp
    degrees = {"tp": target.tp, "pp": target.pp, "chunks": target.num_chunks, "ep": target.ep}
    if etp != target.tp:
        degrees["etp"] = etp
    words: list[str] = [plan.format]
    if plan.format not in ("hf", "torch_dcp"):
        words.append(degrees_text(degrees) or "one rank")
    words.append(f"{len(plan.files)} {'file' if len(plan.files) == 1 else 'files'} of tensors")
    words.append(bytes_text(plan.num_bytes))
    return f"to {save}: {', '.join(words)}"


def plan_lines(plan: Plan, source: StoredModel) -> Iterator[str]:
    """Every file, every tensor in it, and the boxes of which parameters it is made of."""
    names = names_of(source)
    for file in plan.files:
        yield f"{file.name}  {bytes_text(size_of(file))}"
        for key, tensor in file.tensors.items():
            text = origin(tensor, names, source.folder, _MAX_PIECES)
            yield f"    {key} {list(tensor.shape)} {name_of(tensor.dtype)} <- {text}"
    for name, content in plan.texts.items():
        yield f"{name}  {bytes_text(len(content))}"
    yield "nothing was written (--dry-run)"


def names_of(source: StoredModel) -> dict[int, str]:
    """The parameters' names by their tensors' identities, for `origin`."""
    return {id(parameter): name for name, parameter in source.tensors.items()}


def origin(tensor: StoredTensor, names: Mapping[int, str], folder: Path, max_pieces: int | None = None) -> str:
    """The boxes of parameters that a tensor is made of, and the files below `folder` that they lie in."""
    whole = [(0, size) for size in tensor.shape]
    parts, paths = [], set()
    for text, path in _parts(tensor, whole, names):
        parts.append(text)
        paths.add(path)
    shown = parts[:max_pieces]
    more = f" + {len(parts) - len(shown)} more" if len(parts) > len(shown) else ""
    files = sorted(_short(path, folder) for path in paths)
    return f"{' + '.join(shown)}{more}  ({', '.join(files[:3])}{', ...' if len(files) > 3 else ''})"


def _short(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _parts(tensor: StoredTensor, box: Box, names: Mapping[int, str]) -> Iterator[tuple[str, Path]]:
    """The parameters' boxes that a tensor is made of, in words, and the files they lie in."""
    name = names.get(id(tensor))
    if name is not None:
        cut = [
            f"{low}:{high}" if (low, high) != (0, size) else ":"
            for (low, high), size in zip(box, tensor.shape, strict=True)
        ]
        whole = all(part == ":" for part in cut)
        for number, path in enumerate(sorted(_paths(tensor))):
            if number == 0:
                yield name + ("" if whole else f"[{', '.join(cut)}]"), path
        return
    if isinstance(tensor, Assembled):
        for piece in tensor.pieces:
            lead = len(piece.source_start) - len(piece.size)
            size = [1] * max(lead, 0) + list(piece.size)[max(-lead, 0) :]
            inner = [(at, at + length) for at, length in zip(piece.source_start, size, strict=True)]
            yield from _parts(piece.source, inner, names)
        return
    if isinstance(tensor, Derived):
        inner, way = _derived(tensor, box)
        for text, path in _parts(tensor.source, inner, names):
            yield f"{text} {way}".rstrip(), path
        return
    yield tensor.name, tensor.path


def _derived(tensor: Derived, box: Box) -> tuple[Box, str]:
    """The box of its source that a box of the tensor is made of, and how."""
    if isinstance(tensor, Cast):
        return box, f"as {name_of(tensor.dtype)}"
    if isinstance(tensor, PaddedRows):
        (low, high), *rest = box
        num_real = tensor.source.shape[0]
        real = (min(low, num_real - 1), min(max(high, low + 1), num_real))
        padding = max(high - max(low, num_real), 0)
        return [real, *rest], f"and {padding} copies of the last row" if padding else ""
    return bounds(None, tensor.source.shape), "transposed" if isinstance(tensor, Transposed) else ""


def _paths(tensor: StoredTensor) -> set[Path]:
    if isinstance(tensor, Assembled):
        return {path for piece in tensor.pieces for path in _paths(piece.source)}
    return {tensor.path}
