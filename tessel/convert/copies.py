"""Tensors that several ranks' files hold alike: one of them is read, so the others are compared with it here."""

from __future__ import annotations

from tessel.checkpoint.stored import StoredModel
from tessel.convert.compare import Difference, value_difference


def differing_copies(model: StoredModel, tolerance: float | None = None) -> list[Difference]:
    """The copies in a checkpoint's files that are not what they are copies of."""
    found = []
    for copy in model.copies:
        if copy.tensor.dtype != copy.original.dtype and tolerance is None:
            what: str | None = f"is {copy.tensor.dtype} and {copy.original.dtype} in {copy.original.path.parent.name}"
        else:
            what = value_difference(copy.original, copy.tensor, tolerance)
        if what is not None:
            found.append(
                Difference(copy.what, f"should be a copy of what {copy.original.path.parent.name} has, and {what}")
            )
    return found
