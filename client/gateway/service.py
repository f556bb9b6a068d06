"""The gateway as a process: its parts started, watched and stopped, metrics and health over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sqlalchemy.exc
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydicom import config as pydicom_config

from cxr_triton.client import otlp
from cxr_triton.client.door.service import run_until_told
from cxr_triton.client.gateway.association import prepare_pynetdicom
from cxr_triton.client.gateway.config import Config
from cxr_triton.client.gateway.deliver import Deliverer
from cxr_triton.client.gateway.disk import is_open, keep_private
from cxr_triton.client.gateway.doors import Folder
from cxr_triton.client.gateway.intake import Intake
from cxr_triton.client.gateway.listen import Listener
from cxr_triton.client.gateway.log import Log, Metrics
from cxr_triton.client.gateway.priors import PacsFinder, WebFinder
from cxr_triton.client.gateway.read import ReadWorker
from cxr_triton.client.gateway.store import Store
from cxr_triton.client.gateway.stow import stow
from cxr_triton.client.gateway.watch import FolderWatcher
from cxr_triton.client.limits import read_token
from cxr_triton.client.listener import HttpListener
from cxr_triton.errors import QueueFull, Unavailable

BEAT_S = 1.0
HOUSEKEEPING_S = 600.0
STOP_S = 20.0
"""How long what is under way, readings left out, may take to end once the gateway was told to stop."""


class Gateway:
    """All parts of one gateway process.

    Parameters
    ----------
    config : Config
    stream : file, optional
        Takes the log; standard error by default.

    Attributes
    ----------
    dicom_port, web_port : int or None
        What is listened on, once `run` has started.

    Raises
    ------
    Unavailable
        Another process runs under this name.
    InvalidConfig
        The queue cannot be opened.
    """

    def __init__(self, config: Config, stream=None):
        self.config = config
        self._storage = Path(config.storage)
        kept = keep_private(self._storage, group=config.share_with_group)
        self._lock = open(self._storage / f"{config.name}.lock", "w")  # noqa: SIM115  # held until the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Unavailable(
                f"a gateway named {config.name!r} runs on {self._storage}; stop it, or give this one another name"
            ) from None
        self.log = Log(config, stream)
        self._look_round(kept)
        self.store = Store(config.queue_url, config.name)
        self.metrics = Metrics(self.store.counts, lambda: self.intake.free_bytes())  # noqa: PLW0108  # it comes next
        self.intake = Intake(config, self.store, self.log, self.metrics, self._wake_worker)
        prepare_pynetdicom(self.intake.new_file)
        find_prior = None
        if config.priors:
            finder = WebFinder if config.priors.url else PacsFinder
            find_prior = finder(config.priors, self.store, self.intake).fetch
        self.worker = ReadWorker(
            config, self.store, self.log, self.metrics, self._wake_deliverers, find_prior=find_prior
        )
        self.deliverers = [Deliverer(to, config, self.store, self.log, self.metrics) for to in config.destinations]
        self._listener: Listener | None = None
        self._watcher: FolderWatcher | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.dicom_port: int | None = None
        self.web_port: int | None = None

    def _look_round(self, kept: list[str]) -> None:
        """Refuse what cannot be meant, and say once what only whoever installs this can put right."""
        self.config.read.access.metadata()
        for destination in (*self.config.destinations, self.config.priors):
            if destination:
                destination.authorization()
                if destination.tls:
                    destination.tls.client()
        if sections := list(self.config.in_clear_text()):
            self.log("warning", "clear_text", sections=sections, remedy="give tls, or set clear_text: true in it")
        if kept:
            self.log("warning", "not_private", files=kept, remedy="have this user own them")
        open_ = [name for name, path in self.config.secret_files() if is_open(path)]
        if open_:
            self.log("warning", "secret_readable_by_others", keys=open_, remedy="chmod o= FILE")

    def _wake_worker(self) -> None:
        if self._loop:
            with contextlib.suppress(RuntimeError):  # the loop ends while the last association does
                self._loop.call_soon_threadsafe(self.worker.wake.set)

    def _wake_deliverers(self) -> None:
        for deliverer in self.deliverers:
            deliverer.wake.set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Serve until `stopping` is set.

        Raises
        ------
        Unavailable
            A port is taken.
        Exception
            A part failed in a way it does not handle; a supervisor starts the process anew.
        """
        self._loop = asyncio.get_running_loop()
        # A destination that hangs holds a thread; the default pool of a small machine has six.
        self._loop.set_default_executor(ThreadPoolExecutor(16 + 2 * len(self.deliverers)))
        await asyncio.to_thread(self.store.start)
        self.intake.draining = await asyncio.to_thread(self.store.is_draining)
        listener = self._web_listener()
        try:
            async with listener or contextlib.nullcontext():
                self.web_port = listener.port if listener else None
                await self._serve(stopping)
        finally:
            await asyncio.to_thread(self.intake.close)
            await asyncio.to_thread(self.store.close)
            self._lock.close()
            self.log("info", "stopped")

    async def _serve(self, stopping: asyncio.Event) -> None:
        if self.config.dicom:
            self._listener = Listener(self.config.dicom, self.intake, self.deliverers[0].take_commitment)
            self.dicom_port = self._listener.port
        parts = [self.worker.run(stopping), self._keep_house(stopping)]
        parts += [deliverer.run(stopping) for deliverer in self.deliverers]
        if self.config.folder:
            parts.append(self._watch(self.config.folder, stopping))
        tasks = [asyncio.create_task(part) for part in parts]
        self.log("info", "started", dicom_port=self.dicom_port, web_port=self.web_port)
        try:
            wait = asyncio.create_task(stopping.wait())
            done, _ = await asyncio.wait([wait, *tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.set()
            self.intake.draining = True
            if self._listener:
                await asyncio.to_thread(self._listener.stop)
            await asyncio.wait(tasks, timeout=STOP_S + self.config.read.drain_s)
            for task in tasks:
                task.cancel()
        for ended in done & {*tasks}:
            ended.result()

    async def _keep_house(self, stopping: asyncio.Event) -> None:
        """Signs of life, the drain switch, retention and leftovers."""
        clean_at = time.monotonic()
        while not stopping.is_set():
            try:
                await asyncio.to_thread(self.store.beat)
                draining = await asyncio.to_thread(self.store.is_draining)
                if draining != self.intake.draining:
                    self.log("info", "draining" if draining else "taking_in")
                    self.intake.draining = draining
                if time.monotonic() >= clean_at:
                    clean_at = time.monotonic() + HOUSEKEEPING_S
                    await asyncio.to_thread(self._clean)
            except (sqlalchemy.exc.SQLAlchemyError, OSError) as error:
                self.log("error", "housekeeping_failed", error=type(error).__name__)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), BEAT_S)

    def _clean(self) -> None:
        now, keep = time.time(), self.config.retention
        paths = self.store.purge(now - 3600 * keep.done_h, now - 3600 * keep.dead_h)
        for path in paths:
            (self._storage / path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                if path.startswith("results/"):
                    (self._storage / path).parent.rmdir()
        swept = self.intake.sweep()
        if self._watcher:
            swept += self._watcher.sweep(now - 3600 * keep.rejected_h)
        if paths or swept:
            self.log("info", "cleaned", expired=len(paths), leftovers=swept)

    async def _watch(self, config: Folder, stopping: asyncio.Event) -> None:
        self._watcher = watcher = await asyncio.to_thread(FolderWatcher, config, self.intake)
        while not stopping.is_set():
            try:
                await asyncio.to_thread(watcher.scan)
            except OSError as error:
                self.log("error", "folder_failed", error=type(error).__name__)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), config.every_s)

    def _web_listener(self) -> HttpListener | None:
        settings = self.config.web
        if not settings:
            return None
        app = web.Application(client_max_size=1 << 20)  # STOW-RS bodies are read part by part and bounded there
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health/live", self._live)
        app.router.add_get("/health/ready", self._ready)
        if settings.stow:
            token = read_token(settings.token_file) if settings.token_file else None

            async def take(request: web.Request) -> web.Response:
                return await stow(request, self.intake, token, settings)

            app.router.add_post("/dicom-web/studies", take)
            app.router.add_post("/dicom-web/studies/{study:[0-9.]{1,64}}", take)
        return HttpListener(app, settings, self._tell, name="web")

    def _tell(self, event: str, facts: dict[str, str]) -> None:
        if event == "connection_refused":
            self.metrics.connections_refused.labels(facts["why"]).inc()
        self.log("warning", event, door="web", **facts)

    async def _metrics(self, request: web.Request) -> web.Response:
        text = await asyncio.to_thread(generate_latest, self.metrics.registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        """503 when an object that came now would not be taken, or could not be read as the file says.

        A reader that is away is said, but matters only until it has confirmed the names of tasks and modes.
        """
        trouble = []
        if self.intake.draining:
            trouble.append("draining")
        if self.config.dicom and self.dicom_port is None:
            trouble.append("dicom")  # it listens a moment later
        try:
            await asyncio.to_thread(self.intake.require_room)
        except QueueFull:
            trouble.append("disk")
        try:
            await asyncio.to_thread(self.store.beat)
        except sqlalchemy.exc.SQLAlchemyError:
            trouble.append("queue")
        if not self.worker.are_names_known:
            trouble.append("names")  # of tasks, which the server has not confirmed
        body = {
            "status": "not ready" if trouble else "ready",
            "trouble": trouble,
            "server": self.worker.is_server_ready,
        }
        return web.json_response(body, status=503 if trouble else 200)


def serve(config: Config, trace_otlp: str | None = None) -> None:
    """Run a gateway until SIGTERM or SIGINT; both end it in order. Its spans go to `trace_otlp`, see `otlp.start`."""

    async def run(stopping: asyncio.Event) -> None:
        gateway = Gateway(config)
        otlp.start(trace_otlp, "gateway", lambda said: gateway.log("warning", "spans_not_sent", error=said))
        await gateway.run(stopping)

    pydicom_config.settings.reading_validation_mode = pydicom_config.IGNORE
    pydicom_config.settings.writing_validation_mode = pydicom_config.IGNORE
    run_until_told(run)
