"""`tessel pretrain --ai-framework mindspore`, in one process of a run."""

from __future__ import annotations

from tessel.config.run import RunConfig
from tessel.mindspore_engine import cluster
from tessel.mindspore_engine.support import for_the_host


def pretrain(cfg: RunConfig, given: frozenset[str]) -> None:
    """Train as `tessel.train.pretrain` does, with what MindSpore builds in place of torch's model and optimizer.

    Raises:
        UsageError: what was asked for cannot be.
        TesselError: a file is missing or wrong, or the run cannot go on.
    """
    cluster.join()
    # MindSpore reads the environment when it is loaded.
    from tessel.mindspore_engine import start

    start.begin(cfg)
    # Not before: the scheduler of a cluster comes no further, and needs none of it.
    from tessel.mindspore_engine import engine
    from tessel.train.pretrain import pretrain as pretrain_with

    pretrain_with(for_the_host(cfg), given, engine.build_learner)
