"""Flags of context parallelism: aliases, contradictions, and what goes with what."""

from __future__ import annotations

import pytest

from tessel.config.context import COMM_TYPES
from tessel.config.validate import validate
from tessel.errors import UsageError
from tests.config.test_validate import read

CP = "context_parallel_size"

BROKEN = {
    f"{CP}=2 cp_comm_type=p2p context_parallel_algo=ulysses_cp_algo": "--context-parallel-algo ulysses_cp_algo means "
    "--cp-comm-type a2a, and p2p is given: keep one of them.",
    f"{CP}=4 ulysses_degree_in_cp=2": "--ulysses-degree-in-cp 2 is for --cp-comm-type a2a+p2p: add that, or leave",
    f"{CP}=4 cp_comm_type=a2a ulysses_degree_in_cp=4": "--ulysses-degree-in-cp 4 is for --cp-comm-type a2a+p2p",
    f"{CP}=4 cp_comm_type=a2a+p2p ulysses_degree_in_cp=3": "--ulysses-degree-in-cp 3 does not divide "
    "--context-parallel-size 4: use one of 1, 2, 4.",
    f"{CP}=2 attention_dropout=0.1": "--attention-dropout is 0.1: attention that --context-parallel-size 2 shares out "
    "has no dropout of its probabilities. Give --attention-dropout 0.",
}


@pytest.mark.parametrize("changes", BROKEN)
def test_a_broken_rule_names_the_field_its_value_and_the_remedy(changes: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(read(changes))
    assert BROKEN[changes] in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "comm_type"),
    [
        *((f"{CP}=2 context_parallel_algo={algo}", comm_type) for algo, comm_type in COMM_TYPES.items()),
        (f"{CP}=2 context_parallel_algo=ulysses_cp_algo cp_comm_type=a2a", "a2a"),
        (f"{CP}=4 cp_comm_type=a2a+p2p ulysses_degree_in_cp=2", "a2a+p2p"),
        (f"{CP}=2", "p2p"),
        ("attention_dropout=0.1", None),
    ],
)
def test_both_vocabularies_say_the_same(changes: str, comm_type: str | None) -> None:
    cfg = validate(read(changes))
    assert cfg.layout.cp_comm_type == comm_type
    assert validate(cfg) == cfg, "what is resolved stays so"
