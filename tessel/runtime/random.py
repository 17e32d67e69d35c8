"""Random numbers: one seed for a run, and a state that a checkpoint can hold."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tessel.runtime import device as devices


def seed_all(seed: int, pipeline_stage: int = 0) -> None:
    """Seed Python's, NumPy's and torch's generators, on every device.

    Pipeline stages draw other numbers, by Megatron's rule: dropout would else drop alike in all of them.
    """
    seed += 100 * pipeline_stage
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_state(device: torch.device | None = None) -> dict[str, Any]:
    """The state of all generators, made of tensors, ints and None, so that `weights_only` loads it.

    With an accelerator as `device`, its generator is included.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    state = {
        "python_version": version,
        "python_words": torch.tensor(words, dtype=torch.int64),
        "python_gauss": gauss,
        "numpy_keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": int(position),
        "numpy_has_gauss": int(has_gauss),
        "numpy_cached": float(cached),
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type != "cpu":
        state["device"] = devices.rng_state(device)
    return state


def set_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Put back what `get_state` gave. A state without torch's or the device's generator leaves that one as it is."""
    random.setstate((int(state["python_version"]), tuple(state["python_words"].tolist()), state["python_gauss"]))
    keys = state["numpy_keys"].cpu().numpy().astype(np.uint32)
    position, has_gauss = int(state["numpy_position"]), int(state["numpy_has_gauss"])
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy_cached"])))
    if "torch" in state:
        torch.set_rng_state(state["torch"].cpu())
    if device is not None and device.type != "cpu" and "device" in state:
        devices.set_rng_state(device, state["device"].cpu())


@contextlib.contextmanager
def own_stream(number: int, device: torch.device) -> Iterator[None]:
    """Within it, torch draws what only the process with this number draws; others draw something else.

    Meant for processes whose generators are in step, and stay so: one draw from torch's CPU generator,
    alike everywhere, seeds the streams of all, and after it the generators go on from that draw. So the
    stream has no state to save, and what puts torch's generators back, as recomputation does, gets the
    same stream again.
    """
    seed = int(torch.randint(1 << 62, ()).item())
    before, on_device = torch.get_rng_state(), devices.rng_state(device)
    # An odd factor: different numbers give different seeds.
    torch.manual_seed((seed + number * 0x5851F42D4C957F2D) % (1 << 63))
    try:
        yield
    finally:
        torch.set_rng_state(before)
        devices.set_rng_state(device, on_device)
