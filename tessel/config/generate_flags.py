"""Flags of other suites that `tessel generate` and verbs like it know, beside those that they have.

Scripts for generating repeat the flags of the training run.
"""

from __future__ import annotations

from tessel.config.megatron import ACCEPTED, INSTEAD, LATER, LATER_FAMILIES, SAME_FILES, Accepted, ForeignFlags

_NOT_TRAINED = "nothing is trained here"
_OWN_ACCEPTED = {
    **{
        flag: Accepted(num_values, _NOT_TRAINED)
        for flag, num_values in {
            "--micro-batch-size": 1, "--global-batch-size": 1, "--train-iters": 1, "--lr": 1, "--min-lr": 1,
            "--lr-decay-style": 1, "--lr-warmup-fraction": 1, "--weight-decay": 1, "--clip-grad": 1, "--adam-beta1": 1,
            "--adam-beta2": 1, "--initial-loss-scale": 1, "--no-load-optim": 0, "--no-load-rng": 0,
            "--no-save-optim": 0, "--no-save-rng": 0, "--finetune": 0,
            "--use-distributed-optimizer": 0, "--overlap-grad-reduce": 0,
            "--lora-dropout": 1, "--lora-fusion": 0, "--exit-on-missing-checkpoint": 0, "--eval-iters": 1,
        }.items()
    },
    "--ai-framework": Accepted(1, SAME_FILES),
    "--seq-length": Accepted(1, "texts may be as long as the model's context"),
    "--sequence-parallel": Accepted(0, "done where it is needed"),
    "--inference-batch-times-seqlen-threshold": Accepted(1, "texts are computed together as --max-running says"),
    "--max-tokens-to-oom": Accepted(1, "texts are computed together as --max-running says"),
}  # fmt: skip

GENERATION = ForeignFlags(
    {**ACCEPTED, **_OWN_ACCEPTED},
    {flag: remedy for flag, remedy in INSTEAD.items() if flag not in _OWN_ACCEPTED},
    {flag: what for flag, what in LATER.items() if flag not in _OWN_ACCEPTED},
    LATER_FAMILIES,
)
"""For the verbs that use a model."""
