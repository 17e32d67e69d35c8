"""Learning from preferences: a section of frozen dataclasses, as in `run.py`."""

from __future__ import annotations

from dataclasses import dataclass

from tessel.config.field import option


@dataclass(frozen=True)
class Preference:
    """Preferences (DPO)."""

    dpo_loss_type: str = option(
        "sigmoid", "loss of a pair: DPO's, a hinge, or IPO's square", choices=("sigmoid", "hinge", "ipo")
    )
    dpo_beta: float = option(0.1, "how much a difference to the reference counts")
    dpo_label_smoothing: float = option(0.0, "share of pairs that are taken to be labelled wrong; sigmoid only")
    pref_ftx: float = option(0.0, "weight of the chosen answers' own loss, added to that of the pairs")
    ref_model: str | None = option(
        None, "reference model; what --load names if not given, or the frozen model of adapters", metavar="DIR"
    )
    precompute_ref_log_probs: bool = option(
        False, "compute the reference's log-probabilities before training, and keep them in a file beside the data"
    )
    refer_model_iter: int | None = option(None, "accepted: the reference is read once, whatever the micro-batch")
