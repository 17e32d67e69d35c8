"""`tessel serve` as OpenAI's own client sees it, and as clients that misbehave do."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tessel.cli import main
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError
from tessel.generate.batcher import Batcher
from tessel.generate.engine import generate_tokens, load_model
from tessel.generate.request import Event
from tessel.generate.sampling import GREEDY
from tessel.serve import command
from tessel.serve.command import Server, listening
from tests.serve.conftest import serving, until

Start = Callable[..., Server]


def client_of(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return client_of(server)


@pytest.fixture(scope="module")
def expected(served_folder: Path) -> Callable[..., str]:
    """What the model says to a text, greedy, without a server."""
    tokenizer, (model, _) = HuggingFaceTokenizer(served_folder), load_model(served_folder)

    def continue_(text: str, max_new_tokens: int) -> str:
        ids = tokenizer.encode(text)
        new = list(generate_tokens(model, ids, max_new_tokens=max_new_tokens, sampling=GREEDY, eos_ids=[305]))
        return tokenizer.decode([*ids, *new])[len(tokenizer.decode(ids)) :]

    return continue_


def ask(client: openai.OpenAI, said: str = "the dog", **options: Any) -> Any:
    settings: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12} | options
    return client.chat.completions.create(messages=[{"role": "user", "content": said}], **settings)


def send(server: Server, path: str, content: bytes | None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a request that no client would make."""
    request = urllib.request.Request(server.url + path, content, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


# ------------------------------------------------------------------------------------------ answers


def test_an_answer(client: openai.OpenAI, expected: Callable[..., str]) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}]},
        ],
        temperature=0,
        max_completion_tokens=12,
    )
    prompt = "[system] be brief\n[user] the dog\n[assistant] "
    assert answer.choices[0].message.content == expected(prompt, 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.total_tokens - answer.usage.prompt_tokens) == (12, 12)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_stream_is_the_answer(client: openai.OpenAI, expected: Callable[..., str]) -> None:
    chunks = list(ask(client, stream=True, max_tokens=20, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected("[user] the dog\n[assistant] ", 20)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_parallel_streams_are_not_mixed(client: openai.OpenAI, expected: Callable[..., str]) -> None:
    said = [f"the dog number {i} " * (1 + i % 3) for i in range(8)]

    def stream(text: str) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, text, stream=True, max_tokens=30))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(stream, said))
    assert found == [expected(f"[user] {text}\n[assistant] ", 30) for text in said]


def test_completions(client: openai.OpenAI, expected: Callable[..., str], served_folder: Path) -> None:
    prompts = ["the lazy dog", "over the"]
    answer = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=8, n=2)
    assert [choice.text for choice in answer.choices] == [expected(p, 8) for p in prompts for _ in range(2)]
    ids = HuggingFaceTokenizer(served_folder).encode(prompts[0])
    of_ids = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=8)
    assert of_ids.choices[0].text == expected(prompts[0], 8)
    assert of_ids.usage is not None and of_ids.usage.prompt_tokens == len(ids)
    echoed = client.completions.create(model="tiny", prompt=prompts[0], temperature=0, max_tokens=8, echo=True)
    assert echoed.choices[0].text == prompts[0] + expected(prompts[0], 8)
    pieces = client.completions.create(model="tiny", prompt=prompts[1], temperature=0, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected(prompts[1], 8)


def test_stop_strings_seeds_and_several_answers(client: openai.OpenAI, expected: Callable[..., str]) -> None:
    whole = expected("[user] the dog\n[assistant] ", 12)
    stopped = ask(client, stop=[whole[3:5]]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index(whole[3:5])], "stop")
    drawn = [[c.message.content for c in ask(client, temperature=1, seed=s, n=3).choices] for s in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3, "each answer is drawn by itself"
    unseeded = [ask(client, temperature=1).choices[0].message.content for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_logprobs(client: openai.OpenAI) -> None:
    content = ask(client, logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0, "greedy takes the likeliest"
        assert len(entry.top_logprobs) == 3 and entry.token == entry.top_logprobs[0].token
    streamed = [
        entry.logprob
        for chunk in ask(client, logprobs=True, max_tokens=4, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert streamed == pytest.approx([entry.logprob for entry in content], abs=1e-4)
    answer = client.completions.create(model="tiny", prompt="the", temperature=0, max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert [len(top) for top in logprobs.top_logprobs] == [2, 2, 2]
    assert logprobs.text_offset == [0, len(logprobs.tokens[0]), len(logprobs.tokens[0] + logprobs.tokens[1])]


# ------------------------------------------------------------------------------------------ tools

TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_tools_are_in_the_prompt_and_calls_in_the_answer(
    client: openai.OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = server.service.asker.batcher
    monkeypatch.setattr(batcher, "_advance", says(batcher, f"I look.\n{CALL}\n{CALL}"))
    answer = ask(client, tools=TOOLS, max_tokens=200).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("I look.", "tool_calls")
    assert [json.loads(call.function.arguments) for call in answer.message.tool_calls] == [{"city": "Oslo"}] * 2
    chunks = [chunk.choices[0] for chunk in ask(client, tools=TOOLS, stream=True, max_tokens=200)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "I look."
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "weather"), (1, "weather")]
    assert chunks[-1].finish_reason == "tool_calls"
    plain = ask(client, max_tokens=200).choices[0]
    assert plain.message.content == f"I look.\n{CALL}\n{CALL}" and plain.message.tool_calls is None


def says(batcher: Batcher, text: str) -> Callable[..., Event]:
    """In the place of `batcher._advance`: the text, four letters a step."""
    pieces = [text[i : i + 4] for i in range(0, len(text), 4)]

    def advance(running: Any, *_: Any) -> Event:
        done = running.num_new
        running.append(7)
        if done + 1 < len(pieces):
            return Event(running.number, 7, pieces[done])
        batcher._leave(running)
        return Event(running.number, 7, pieces[done], finish="stop")

    return advance


def test_a_tool_answers(client: openai.OpenAI, server: Server, expected: Callable[..., str]) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "the dog"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ]
    options: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 9}
    answer = client.chat.completions.create(**options, tools=TOOLS)
    rest = '[user] the dog\n[assistant] <tool_call>weather {"a": 1}</tool_call>\n[tool] rain\n[assistant] '
    assert answer.choices[0].message.content == expected(f"<tool>weather</tool>\n{rest}", 9)
    without = client.chat.completions.create(**options, tools=TOOLS, tool_choice="none")
    assert without.choices[0].message.content == expected(rest, 9)
    messages[1]["tool_calls"][0]["function"]["arguments"] = "{"
    with pytest.raises(openai.BadRequestError, match="arguments of weather are not JSON"):
        client.chat.completions.create(**options)


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"foo": 1}, "foo", "unknown_parameter"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"frequency_penalty": 1.0}, "frequency_penalty", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", None),
        ({"messages": [{"role": "user", "content": "dog " * 600}]}, "messages", "context_length_exceeded"),
        ({"max_tokens": 513}, "max_tokens", None),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"tool_choice": "always"}, "tool_choice", "invalid_value"),
    ],
)
def test_fields_that_are_wrong(change: dict[str, Any], param: str, code: str | None, server: Server) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | change
    status, answer = send(server, "/v1/chat/completions", json.dumps(body).encode())
    error = answer["error"]
    assert (status, error["type"], error["code"]) == (400, "invalid_request_error", code)
    assert error["param"].startswith(param) and error["message"]


def test_requests_that_are_garbage(server: Server, client: openai.OpenAI) -> None:
    path = "/v1/chat/completions"
    for content in (b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"{}", b'{"model": {}}'):
        status, answer = send(server, path, content)
        assert status == 400 and answer["error"]["type"] == "invalid_request_error", content
    assert send(server, path, b"a=b", **{"Content-Type": "application/x-www-form-urlencoded"})[0] == 415
    assert send(server, path, b" " * 100_001)[0] == 413
    assert send(server, "/v1/nothing", None)[1]["error"]["code"] == "unknown_url"
    assert send(server, path, None)[0] == 405
    for host in ("evil.example", "[fe80::1]", "127.0.0.1.evil.example:80"):
        assert send(server, "/health", None, Host=host)[0] == 403
    assert send(server, "/health", None, Host="[::1]")[0] == send(server, "/health", None, Host="localhost:1")[0] == 200
    with pytest.raises(openai.NotFoundError, match="'gpt-9' does not exist; this server has 'tiny'"):
        ask(client, model="gpt-9")
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:  # type: ignore[arg-type]
        raw.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert b"400" in raw.recv(100)
    body = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:  # type: ignore[arg-type]
        raw.sendall(body + b"Transfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b" " * 0x8000 + b"\r\n")
        raw.sendall((b"8000\r\n" + b" " * 0x8000 + b"\r\n") * 3)
        assert b"413" in raw.recv(100)
    assert send(server, "/health", None) == (200, {"status": "ok"})


def test_a_key(start: Start) -> None:
    server = start("--api-key", "secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer s\xe9cret"}):
        for path in ("/v1/models", "/metrics"):
            status, answer = send(server, path, None, **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        ask(client_of(server, "wrong"))
    assert ask(client_of(server, "secret")).choices[0].message.content
    assert send(server, "/health", None)[0] == 200


# ------------------------------------------------------------------------------------------ load


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Steps of every batcher wait until this is set."""
    go = threading.Event()
    step = Batcher.step

    def waits(self: Batcher) -> Any:
        go.wait(30)
        return step(self)

    monkeypatch.setattr(Batcher, "step", waits)
    return go


def test_a_full_queue(start: Start, slow: threading.Event) -> None:
    server = start("--max-running", "2", "--max-waiting", "1")
    client = client_of(server)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, client, f"dog {i}") for i in range(3)]
        until(lambda: server.service.worker.num_texts == 3)
        with pytest.raises(openai.RateLimitError, match="queue is full") as refused:
            ask(client)
        assert refused.value.response.headers["retry-after"] == "1"
        slow.set()
        assert all(one.result().choices[0].message.content for one in asked)
    with pytest.raises(openai.BadRequestError, match="4 texts is more than this server takes, 3"):
        ask(client, n=4)
    assert ask(client).choices[0].message.content


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_ends_its_text(streams: bool, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Batcher.step

    def slower(self: Batcher) -> Any:
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Batcher, "step", slower)
    worker, counts = server.service.worker, server.service.asker.batcher.counts
    before = counts.new_tokens
    body = {"model": "tiny", "prompt": "the dog", "max_tokens": 500, "stream": streams, "ignore_eos": True}
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as raw:  # type: ignore[arg-type]
        raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        until(lambda: counts.new_tokens > before + 2)
    until(lambda: worker.num_texts == 0)
    assert counts.new_tokens < before + 300


def test_a_request_that_takes_too_long(start: Start, slow: threading.Event) -> None:
    server = start("--request-timeout-s", "0.3")
    client = client_of(server)
    with pytest.raises(openai.InternalServerError, match="longer than 0.3 s") as late:
        ask(client)
    assert late.value.status_code == 504
    with pytest.raises(openai.APIError, match="longer than 0.3 s"):
        list(ask(client, stream=True))
    slow.set()
    until(lambda: server.service.worker.num_texts == 0)


def test_what_ended_is_counted(start: Start) -> None:
    server = start()
    client = client_of(server)
    ask(client)
    list(ask(client, stream=True))
    with pytest.raises(openai.BadRequestError):
        ask(client, extra_body={"foo": 1})
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    assert 'tessel_requests_total{path="/v1/chat/completions",status="200"} 2' in lines
    assert 'tessel_requests_total{path="/v1/chat/completions",status="400"} 1' in lines
    assert "tessel_new_tokens_total 24" in lines and "tessel_running_texts 0" in lines
    assert 'tessel_first_token_seconds_bucket{le="+Inf"} 2' in lines


def test_a_server_that_is_told_to_stop_lets_streams_end(start: Start, slow: threading.Event) -> None:
    server = start()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client_of(server))
        until(lambda: server.service.worker.num_texts == 1)
        server.should_exit = True
        slow.set()
        assert asked.result().choices[0].message.content


def test_a_model_that_fails_ends_the_server(
    served_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(self: Batcher) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Batcher, "step", breaks)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    asked: list[BaseException] = []

    def ask_it(server: Server) -> None:
        def work() -> None:
            with pytest.raises(openai.InternalServerError, match="shutting down") as error:
                ask(client_of(server))
            asked.append(error.value)

        threading.Thread(target=work).start()

    serve = command.serve
    monkeypatch.setattr(command, "serve", lambda cfg, given: serve(cfg, given, ask_it))
    assert main(["serve", "--load", str(served_folder), "--device", "cpu", "--port", "0"]) == 1
    until(lambda: bool(asked))
    assert "The model has failed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ starting


def test_a_port_in_use(served_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listening("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--load", str(served_folder), "--device", "cpu", "--port", port]) == 1
    assert (
        f"--port {port} cannot be listened on: Address already in use. Give another --port" in capsys.readouterr().err
    )
    with pytest.raises(TesselError, match="cannot be listened on"), listening("192.0.2.1", 0):
        pass


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--max-running", "0"], "--max-running is 0: it must be at least 1"),
        (["--request-timeout-s", "0"], "--request-timeout-s is 0.0: it must be above 0"),
        (["--api-key", ""], "--api-key is empty"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size is 0: it must be at least 1"),
    ],
)
def test_flags_that_are_wrong(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--load", "x", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_template_completes_alone(served_folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(served_folder, plain)
    (plain / "chat_template.jinja").unlink()
    with serving(plain, "--served-model-name", "p") as server:
        client = client_of(server)
        assert client.completions.create(model="p", prompt="the dog", max_tokens=3).choices[0].text
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            ask(client, model="p")
