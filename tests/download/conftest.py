"""A hub of our own, and an environment without the user's mirrors, proxies and tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tessel.cli import main
from tessel.download import command, http
from tessel.download.transfer import Retries
from tests.download.server import Hub, serving


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither a mirror nor offline mode nor a token of whoever runs the tests, and no wait between tries."""
    import huggingface_hub.constants as constants

    for name in os.environ:
        if name.startswith(("HF_", "HUGGING", "MODELSCOPE_", "TRANSFORMERS_OFFLINE")) or name.lower().endswith(
            "_proxy"
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    home = tmp_path_factory.mktemp("hf_home")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(command, "RETRIES", Retries(tries=3, wait_s=0.0, max_wait_s=0.0))
    http._opener.cache_clear()
    yield
    http._opener.cache_clear()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub; HF_ENDPOINT and MODELSCOPE_ENDPOINT name it."""
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        yield hub


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tessel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`tessel(*arguments)` runs `tessel download` in the test's folder: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["download", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
