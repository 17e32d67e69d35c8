"""The server's paths."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from tessel.config.serve import Limits
from tessel.generate.request import Event, Request
from tessel.serve.asking import Asker
from tessel.serve.errors import ApiError, of_validation
from tessel.serve.gate import Gate
from tessel.serve.metrics import CONTENT_TYPE, Metrics
from tessel.serve.protocol import ChatBody, CompletionBody
from tessel.serve.replies import DONE, ChatReply, CompletionReply, Reply, sse
from tessel.serve.worker import Job, Worker

T = TypeVar("T")
Batches = AsyncGenerator[list[tuple[int, Event]], None]
_CLIENT_IS_GONE = 499
_SWITCH_S = 0.001
# The page loads nothing from elsewhere, and no other page may put it into a frame.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass
class Service:
    """What the paths share: one model under one name. `on_end` is called when the model's thread has ended."""

    name: str
    asker: Asker
    limits: Limits
    on_end: Callable[[], None] = lambda: None
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    worker: Worker = field(init=False)
    _writers: ThreadPoolExecutor = field(init=False)

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """The model's thread lasts as long as the body."""
        limits, switch_s = self.limits, sys.getswitchinterval()
        # The model's thread and the loop take turns in Python: a loop that waits long leaves places in the batch empty.
        sys.setswitchinterval(_SWITCH_S)
        # Templates and tokenizers take milliseconds, in which streams go on. Together they are no faster.
        self._writers = ThreadPoolExecutor(1, "template")
        self.worker = Worker(self.asker.batcher, limits.max_running + limits.max_waiting, self.on_end)
        try:
            yield
        finally:
            await self.worker.stop()
            self._writers.shutdown(wait=False)
            sys.setswitchinterval(switch_s)

    def model(self) -> dict[str, Any]:
        """The model as /v1/models has it."""
        context = self.asker.opened.config.max_position_embeddings
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tessel",
            "max_model_len": context,
        }

    def check_model(self, name: str) -> None:
        """Refuse the name of another model."""
        if name != self.name:
            raise ApiError(
                404, f"The model '{name}' does not exist; this server has '{self.name}'.", "model", "model_not_found"
            )

    async def answer(
        self,
        http: HttpRequest,
        body: ChatBody | CompletionBody,
        write: Callable[[], list[Request]],
        reply_of: Callable[[list[Request]], Reply],
    ) -> Response:
        """Run what `write` makes of a body, and answer as `reply_of` that says."""
        started_s = time.monotonic()
        self.check_model(body.model)
        requests = await asyncio.get_running_loop().run_in_executor(self._writers, write)
        reply = reply_of(requests)
        job = self.worker.submit(requests)
        events = self._events(job, started_s, http.url.path, bool(body.stream))
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return _EventStream(_streamed(reply, events, with_usage), lambda: self.worker.cancel(job))
        found: list[tuple[int, Event]] | None = await _while_connected(http, _all(events))
        if found is None:
            return Response(status_code=_CLIENT_IS_GONE)
        return JSONResponse(reply.whole(found))

    async def _events(self, job: Job, started_s: float, path: str, streams: bool) -> Batches:
        """The events of a job, counted and limited in time; whoever leaves early ends it."""
        timer = asyncio.get_running_loop().call_later(self.limits.request_timeout_s, self._expire, job)
        is_first, outcome = True, "disconnected"
        try:
            async for events in job:
                if is_first:
                    self.metrics.first_token_s.add(time.monotonic() - started_s)
                    is_first = False
                yield events
            outcome = "200"
        except ApiError as error:
            outcome = str(error.status) if streams else ""  # of others, the answer that says so is counted
            raise
        finally:
            timer.cancel()
            self.worker.cancel(job)
            if outcome:
                self.metrics.requests[path, outcome] += 1
            self.metrics.request_s.add(time.monotonic() - started_s)

    def _expire(self, job: Job) -> None:
        self.worker.cancel(job)
        job.fail(ApiError(504, f"The answer took longer than {self.limits.request_timeout_s:g} s.", code="timeout"))


class _EventStream(StreamingResponse):
    """Server-sent events. `on_end` is called in any case, also where the client left before the first one."""

    def __init__(self, content: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _all(batches: Batches) -> list[tuple[int, Event]]:
    return [event async for events in batches for event in events]


async def _streamed(reply: Reply, batches: Batches, with_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; an error after the first one is one of them."""
    try:
        openings = reply.openings()
        if openings:
            yield b"".join(reply.chunk([choice]) for choice in openings)
        async for events in batches:
            of_choices: dict[int, list[Event]] = {}
            for number, event in events:
                of_choices.setdefault(number, []).append(event)
            pieces = (reply.piece(number, own) for number, own in of_choices.items())
            written = b"".join(reply.chunk([piece]) for piece in pieces if piece is not None)
            if written:
                yield written
        if with_usage:
            yield reply.chunk([], usage=True)
    except ApiError as error:
        yield sse(error.body())
    finally:
        await batches.aclose()
    yield DONE


async def _while_connected(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None, and its end, where the client leaves first."""
    task = asyncio.create_task(work)
    left = asyncio.create_task(_leaving(http))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, left):
            one.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await one


async def _leaving(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def make_app(service: Service, api_key: str | None, is_local: bool) -> FastAPI:
    """The application."""
    app = FastAPI(title="tessel", lifespan=service.running, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, api_key=api_key, is_local=is_local, max_body_bytes=service.limits.max_body_bytes)
    page = resources.files("tessel.serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def _page() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @app.get("/health")
    async def _health() -> JSONResponse:
        alive = service.worker.is_alive
        return JSONResponse({"status": "ok" if alive else "the model is not running"}, 200 if alive else 503)

    @app.get("/metrics")
    async def _metrics() -> Response:
        return Response(service.metrics.text(service.worker.batcher), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def _models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name:path}")
    async def _model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model()

    @app.post("/v1/chat/completions")
    async def _chat(http: HttpRequest, body: ChatBody) -> Response:
        return await service.answer(http, body, partial(service.asker.chat, body), partial(_chat_reply, service, body))

    @app.post("/v1/completions")
    async def _complete(http: HttpRequest, body: CompletionBody) -> Response:
        write = partial(service.asker.complete, body)
        return await service.answer(http, body, write, partial(_completion_reply, service, body))

    _put_errors(app, service)
    return app


def _chat_reply(service: Service, body: ChatBody, requests: list[Request]) -> Reply:
    has_tools = bool(body.tools) and body.tool_choice != "none"
    prompt_tokens = len(requests[0].prompt_ids)
    return ChatReply(
        service.name, service.asker.opened.tokenizer.decode, len(requests), prompt_tokens, has_tools=has_tools
    )


def _completion_reply(service: Service, body: CompletionBody, requests: list[Request]) -> Reply:
    decode = service.asker.opened.tokenizer.decode
    prompts = [decode(request.prompt_ids) if body.echo else "" for request in requests]
    prompt_tokens = sum(len(request.prompt_ids) for request in requests[:: body.n or 1])
    return CompletionReply(service.name, decode, len(requests), prompt_tokens, prompts=prompts)


def _put_errors(app: FastAPI, service: Service) -> None:
    """Every error in OpenAI's form."""

    def counted(http: HttpRequest, error: ApiError) -> Response:
        service.metrics.requests[_known_path(http), str(error.status)] += 1
        return error.response()

    @app.exception_handler(ApiError)
    async def _of_api(http: HttpRequest, error: ApiError) -> Response:
        return counted(http, error)

    @app.exception_handler(RequestValidationError)
    async def _of_body(http: HttpRequest, error: RequestValidationError) -> Response:
        return counted(http, of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def _of_http(http: HttpRequest, error: HTTPException) -> Response:
        if error.status_code == 404:
            return counted(
                http, ApiError(404, f"Unknown request URL: {http.method} {http.url.path}.", code="unknown_url")
            )
        return counted(http, ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def _of_bug(http: HttpRequest, error: Exception) -> Response:
        return counted(http, ApiError(500, "The server failed; its log says more."))


def _known_path(http: HttpRequest) -> str:
    """The path, where it is one of the server's: a counter for each that clients can think of would grow for ever."""
    route = http.scope.get("route")
    return getattr(route, "path", "other")
