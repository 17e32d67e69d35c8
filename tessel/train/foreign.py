"""Going on from a checkpoint of another suite: its weights, moments, schedule and counters, on any layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tessel.checkpoint.fill import fill
from tessel.checkpoint.stored import StoredModel, StoredTensor
from tessel.checkpoint.weights import named
from tessel.config.run import ModelShape
from tessel.errors import TesselError
from tessel.model.config import ModelConfig
from tessel.runtime.watchdog import unlimited
from tessel.train.learner import Learner

_SCHEDULE = "opt_param_scheduler"
_MASTER = "param."
_STEP = "step"


def with_given(stored: StoredModel, shape: ModelShape, given: frozenset[str]) -> ModelConfig:
    """The model, with what its args do not say by what the command line says: RoPE's theta, which tools leave out."""
    config = stored.config
    if stored.guessed and "rotary_base" in given and shape.rotary_base is not None:
        config = replace(config, rope_theta=float(shape.rotary_base))
    return config


def is_of_a_run(stored: StoredModel) -> bool:
    """Whether it was written in training: converters and releases have weights alone."""
    return stored.iteration is not None and (bool(stored.optimizer) or _SCHEDULE in stored.state)


def weights(stored: StoredModel, with_optimizer: bool) -> Mapping[str, StoredTensor]:
    """The stored tensor of each parameter: the optimizer's fp32 one where there is one and the optimizer goes on."""
    if not with_optimizer:
        return stored.tensors
    return {name: stored.optimizer.get(_MASTER + name, tensor) for name, tensor in stored.tensors.items()}


def run_state(stored: StoredModel, identity: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json would say, had tessel written it. `identity` and `layout` are this run's: the data is not known."""
    return {
        "iteration": stored.iteration or 0,
        "consumed_train_samples": int(stored.state.get("consumed_train_samples", 0)),
        "scheduler": dict(stored.state.get(_SCHEDULE, {})),
        "scaler": stored.state.get("grad_scaler") or {},
        "identity": dict(identity),
        "layout": dict(layout),
    }


def require_optimizer(stored: StoredModel, has_state: bool = True) -> None:
    """Refuse to go on with moments that are not there. `has_state`: whether the optimizer has any (SGD may not).

    Raises:
        TesselError: the checkpoint has none, or no schedule.
    """
    lacks_state = has_state and not stored.optimizer
    if not lacks_state and _SCHEDULE in stored.state:
        return
    what = "the optimizer's state" if lacks_state else "the schedule's numbers"
    unread = [line for line in stored.left_out if line.startswith("The optimizer's state")]
    said = f"{stored.folder}: {unread[0]}" if lacks_state and unread else f"{stored.folder} was saved without {what}."
    raise TesselError(
        f"{said} Pass --no-load-optim to go on from its iteration with a fresh optimizer, or --finetune to start at "
        "iteration 0."
    )


@torch.no_grad()
def load_optimizer(stored: StoredModel, learner: Learner) -> None:
    """Fill the optimizer's state; each process reads its own part of it.

    Raises:
        TesselError: the checkpoint lacks some of it; says what.
    """
    tensors = learner.optimizer_tensors()
    entries = {name: name.removeprefix("optimizer.") for name in tensors}
    missing = [own for own in entries.values() if own not in stored.optimizer and not own.startswith(f"{_STEP}.")]
    if missing:
        raise TesselError(
            f"{stored.folder} lacks {len(missing)} of the optimizer's tensors: {named(missing)}. It is of another "
            "optimizer, or not whole; pass --no-load-optim to go on with a fresh one."
        )
    with unlimited("reading the optimizer's state"):
        for name, own in entries.items():
            kind, _, parameter = own.partition(".")
            if kind == _STEP:
                tensors[name].fill_(float(stored.state.get(_STEP, stored.iteration or 0)))
            else:
                fill(tensors[name], learner.tiles[parameter], stored.optimizer[own])
    learner.keep_optimizer(tensors)


def account(stored: StoredModel, taken: bool, with_optimizer: bool) -> Iterator[str]:
    """Lines that say what was guessed, what a run takes over, and what it cannot."""
    for line in stored.guessed:
        yield f"guessed: {line}"
    for line in stored.notes:
        yield f"note: {line}"
    if taken:
        what = [f"iteration {stored.iteration}"]
        what.append(f"{int(stored.state.get('consumed_train_samples', 0)):,} samples")
        if with_optimizer:
            kinds = [
                kind
                for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer")
                if any(n.startswith(f"{kind}.") for n in stored.optimizer)
            ]
            what += ["the schedule", *kinds]
            if any(name.startswith(_MASTER) for name in stored.optimizer):
                what.append("fp32 weights")
        yield f"taken over from the {stored.format} checkpoint: {', '.join(what)}"
        for line in stored.left_out:
            yield f"not carried over: {line}"
    else:
        yield "the weights alone are taken; starting at iteration 0"
