"""The harness's tasks are found without reading all of them, and no other than by reading all."""

from __future__ import annotations

from pathlib import Path

import pytest

TASKS = {
    "letters/_all.yaml": "group: letters\ntask: [letters_a, {task: letters_b, num_fewshot: 1}, {group: elsewhere}]\n",
    "letters/a.yaml": 'include: _default\n"task": "letters_a"\n',
    "letters/b.yaml": "include: _default\ntask: letters_b\ntag: shared\n",
    "letters/_default": "output_type: multiple_choice\n",
    "other/deep/one.yaml": "group: elsewhere\ntask: [number]\n",
    "other/number.yaml": "task: number\ntag:\n  - shared\n",
    "third/alone.yaml": "task: alone\n",
    "third/broken.yaml": "group: broken\ntask: [not_there]\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of tasks in the harness's layout."""
    for name, text in TASKS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["alone"], {"alone", "broken"}),
        (["letters"], {"letters", "letters_a", "letters_b", "elsewhere", "number", "shared"}),
        (["elsewhere", "alone"], {"elsewhere", "number", "shared", "alone", "broken"}),
        (["shared"], None),
        (["letters_*"], None),
        (["broken"], None),
        (["nowhere", "alone"], None),
    ],
)
def test_what_is_asked_for_is_known(root: Path, names: list[str], known: set[str] | None) -> None:
    """None: all tasks are read, for a tag, a pattern, or a name that is in no file."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'tessel[harness]')")
    from tessel.evaluate.harness_index import index_of

    everything = {"letters", "letters_a", "letters_b", "elsewhere", "number", "shared", "alone", "broken"}
    assert set(index_of(names, root).task_index) == (everything if known is None else known)
