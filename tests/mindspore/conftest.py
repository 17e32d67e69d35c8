"""These tests need MindSpore: `make test-mindspore` installs it and runs them."""

import importlib.util
import os

import pytest

os.environ.setdefault("GLOG_v", "3")


@pytest.fixture(scope="session", autouse=True)
def mindspore() -> None:
    """Skips where there is none."""
    if importlib.util.find_spec("mindspore") is None:
        pytest.skip("MindSpore is not installed: make test-mindspore installs it, and runs these tests")
