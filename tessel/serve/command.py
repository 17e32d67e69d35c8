"""`tessel serve`: from the flags to a server that runs until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from tessel.config.chat import Templating
from tessel.config.serve import KEY_VARIABLE, Limits, ServeConfig, is_loopback
from tessel.errors import TesselError
from tessel.generate.batcher import Batcher
from tessel.generate.dialogues import ChatTemplate
from tessel.generate.load import Opened, open_for_use
from tessel.generate.lockstep import in_step
from tessel.runtime.world import World
from tessel.serve.app import Service, make_app
from tessel.serve.asking import Asker
from tessel.serve.grammars import Grammars

_USUAL_TOKENS = 8192
"""Of a text, where --cache-tokens does not say how many there is room for."""
_LAST_WORDS_S = 5
"""After --shutdown-timeout-s, for requests to be told that they are cut off."""


def serve(
    cfg: ServeConfig, given: frozenset[str] = frozenset(), on_ready: Callable[[Server], None] = lambda _: None
) -> None:
    """Serve until SIGTERM or Ctrl-C; `given` names the fields that the user set.

    Of several processes that hold the model, rank 0 has the server, and the others take its steps. `on_ready` is
    called with the server when it takes requests, from its thread.

    Raises:
        TesselError: no model, an address that cannot be listened on, or a model that failed.
    """
    with (
        _listening_first(cfg) as listener,
        open_for_use(cfg.loading, cfg.tokenizer, cfg.launch, shape=cfg.model, given=given) as opened,
        in_step(opened, guide=(grammars := Grammars(opened)).guide, **batcher_options(opened, cfg.limits)) as batcher,
    ):
        if batcher is None or listener is None:
            return
        name = cfg.served_model_name or _name_of(cfg)
        service = Service(name, asker_of(opened, batcher, grammars, cfg.templating, cfg.limits), cfg.limits)
        server = Server(service, listener, server_key(cfg), is_loopback(cfg.host), on_ready)
        for line in (*opened.notes, *_notes(cfg, service, server.url)):
            print(line, file=sys.stderr, flush=True)
        server.run_until_told()
        if server.has_failed:
            raise TesselError("The model has failed (see above), and the server has ended.")
    print("stopped", file=sys.stderr, flush=True)


def batcher_options(opened: Opened, limits: Limits) -> dict[str, int]:
    """The limits as a batcher takes them."""
    context = opened.config.max_position_embeddings
    return {
        "max_running": limits.max_running,
        "max_tokens": limits.cache_tokens or max(limits.max_running * min(context, _USUAL_TOKENS), context + 1),
        "prefill_tokens": limits.prefill_tokens,
        "kept_tokens": limits.kept_tokens,
    }


def asker_of(opened: Opened, batcher: Batcher, grammars: Grammars, templating: Templating, limits: Limits) -> Asker:
    """What turns the bodies of requests into work for a batcher, within the limits."""
    template, problem = None, ""
    try:
        template = ChatTemplate.of(opened.tokenizer, templating)
    except TesselError as error:
        if templating.prompt_type is not None or templating.prompt_type_path is not None:
            raise
        problem = str(error)
    context = opened.config.max_position_embeddings
    most = context if limits.max_new_tokens is None else min(limits.max_new_tokens, context)
    return Asker(opened, batcher, template, problem, most, batcher_options(opened, limits)["max_tokens"], grammars)


class Server(uvicorn.Server):
    """One that ends without a signal being raised anew, so that the model is let go of in order."""

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        api_key: str | None,
        is_local: bool,
        on_ready: Callable[[Server], None] = lambda _: None,
    ) -> None:
        app = make_app(service, api_key, is_local)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(service.limits.shutdown_timeout_s) + _LAST_WORDS_S,
        )
        super().__init__(config)
        self.service, self._listener, self._on_ready = service, listener, on_ready
        self.has_failed = False
        service.on_end = self._on_worker_end
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run_until_told(self) -> None:
        """Serve until a signal, or until `should_exit` is set."""
        self.run(sockets=[self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn; the address is listened on by now."""
        await super().startup(sockets)
        self._on_ready(self)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn; requests that take longer than they may end with an error."""
        loop, worker = asyncio.get_running_loop(), self.service.worker
        timer = loop.call_later(self.service.limits.shutdown_timeout_s, worker.end)
        await super().shutdown(sockets)
        timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal ends the server; a second one ends it without waiting for requests."""
        if self.should_exit:
            self.service.worker.end()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals come to `handle_exit`, and are not raised anew at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_worker_end(self) -> None:
        if not self.should_exit:
            self.has_failed = self.should_exit = True


def _listening_first(cfg: ServeConfig) -> contextlib.AbstractContextManager[socket.socket | None]:
    """The server's socket, where the server is: in rank 0."""
    return listening(cfg.host, cfg.port) if World.from_environment().rank == 0 else contextlib.nullcontext()


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that holds the address, before a large model is read for it.

    Raises:
        TesselError: it is in use, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(1024)
        except OSError as error:
            remedy = "Give another --port, or 0 for a free one." if port else "Give another --host."
            raise TesselError(
                f"--host {host} --port {port} cannot be listened on: {error.strerror}. {remedy}"
            ) from error
        yield listener


def server_key(cfg: ServeConfig) -> str | None:
    """What clients must send: --api-key, else the environment's."""
    return cfg.api_key or os.environ.get(KEY_VARIABLE) or None


def _name_of(cfg: ServeConfig) -> str:
    folder = cfg.loading.load or cfg.loading.lora_load
    assert folder is not None
    return Path(folder).resolve().name


def _notes(cfg: ServeConfig, service: Service, url: str) -> Iterator[str]:
    asker = service.asker
    if asker.template is None:
        yield f"no chat, completions alone: {asker.no_template}"
    else:
        yield f"template: {asker.template.source}"
    yield f"room for keys and values: {asker.cache_tokens} tokens of all running texts"
    if server_key(cfg) is None and not is_loopback(cfg.host):
        yield f"warning: whoever reaches {cfg.host} can use the model; give --api-key"
    yield f"serving {service.name} at {url} (chat page), {url}/v1 (OpenAI's API); Ctrl-C stops"
