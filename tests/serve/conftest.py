"""Servers of a tiny model, in threads on free ports."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from tessel.config.generate_flags import GENERATION
from tessel.config.parser import parse
from tessel.config.serve import ServeConfig, validate_serve
from tessel.serve.command import Server, serve

Serving = Callable[..., AbstractContextManager[Server]]
TEMPLATE = (
    "{% if tools %}{% for t in tools %}<tool>{{ t.function.name }}</tool>{{ '\\n' }}{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    """A server of the model in a folder, by its command line."""
    parsed = parse(
        ServeConfig, ["--load", str(folder), "--device", "cpu", "--port", "0", *flags], "tessel serve", GENERATION
    )
    ready: queue.Queue[Server | BaseException] = queue.Queue()

    def run() -> None:
        try:
            serve(validate_serve(parsed.value, parsed.given), parsed.given, ready.put)
        except BaseException as error:
            ready.put(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    server = ready.get(timeout=120)
    if isinstance(server, BaseException):
        raise server
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server ends when it is told to"


def until(condition: Callable[[], object]) -> None:
    """Wait until it holds; fails after half a minute."""
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """A tiny model with a chat template that knows tools."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("served") / "tiny"
    config = transformers.Qwen2Config(
        vocab_size=307,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=305,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_tokenizer_folder).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def server(served_folder: Path) -> Iterator[Server]:
    """One server for all tests that need nothing special of it."""
    with serving(served_folder, "--max-body-bytes", "100000") as running:
        yield running


@pytest.fixture
def start(served_folder: Path) -> Iterator[Callable[..., Server]]:
    """`start(*flags)`: a server of its own, which ends with the test."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(serving(served_folder, *flags))
