"""A process that used gRPC ends: no call and no channel is left when its interpreter begins to.

A call that dies later takes a lock that one of gRPC's threads may hold, and those have stopped for ever by then: the
process never exits. It happens once in some hundred exits under load, so what is tested is what makes it possible:
with the garbage collector off, nothing of gRPC is alive after the last function that Python calls at exit.
"""

import subprocess
import sys

import grpc
import pytest
from fake_server import FakeServer, failure, pause, response
from test_load import READING as BENCH_READING
from test_reader import READING, TEXT

REPORT = """
import atexit, gc, os, signal, sys, threading
gc.disable()

@atexit.register
def report():  # the first to be registered is called last
    import grpc, grpc._channel, grpc.aio, grpc.aio._call
    kinds = (grpc._channel._Rendezvous, grpc.Channel, grpc.aio.Channel, grpc.aio._call.Call)
    alive = sorted(type(thing).__name__ for thing in gc.get_objects() if issubclass(type(thing), kinds))
    print("alive:", *alive, file=sys.stderr, flush=True)

url, how = sys.argv[1:3]
connect_s, total_s = (0.3 if how == "unreachable" else 30), (0.3 if how == "timeout" else 600)
def interrupt(after_s=0.3):
    threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT)).start()
"""
READER = """
from cxr_triton.client import Reader, Timeouts
reader = Reader(url, timeouts=Timeouts(connect_s=connect_s, total_s=total_s))
stream = reader.read(b"x", prompt=how)
for delta in stream:
    if how == "abandoned":
        break
    if how == "interrupted":
        interrupt()
"""
WITH_READER = """
from cxr_triton.client import Reader, Timeouts
with Reader(url, timeouts=Timeouts(connect_s=connect_s, total_s=total_s)) as reader:
    for delta in reader.read(b"x", prompt=how):
        if how == "abandoned":
            break
        if how == "interrupted":
            interrupt()
"""
AIO = """
import asyncio
from cxr_triton.client import AsyncReader, Timeouts

async def run():
    global reader, stream
    reader = AsyncReader(url, timeouts=Timeouts(connect_s=connect_s, total_s=total_s))
    stream = reader.read(b"x", prompt=how)
    async for delta in stream:
        if how == "abandoned":
            break
        if how == "interrupted":
            interrupt()
asyncio.run(run())
"""
WITH_AIO = """
import asyncio
from cxr_triton.client import AsyncReader, Timeouts

async def run():
    async with AsyncReader(url, timeouts=Timeouts(connect_s=connect_s, total_s=total_s)) as reader:
        async for delta in reader.read(b"x", prompt=how):
            if how == "abandoned":
                break
            if how == "interrupted":
                interrupt()
asyncio.run(run())
"""
VERB = """
import cxr_triton.client.command as command
from cxr_triton.cli import main
from cxr_triton.client import Timeouts

command.Timeouts = lambda **limits: Timeouts(**limits, connect_s=connect_s)
echo = command.click.echo
def echo_and_interrupt(*args, **kwargs):
    echo(*args, **kwargs)
    interrupt()
if how == "interrupted":
    command.click.echo = echo_and_interrupt
main(["read", "--url", url, "--prompt", how, "--timeout-s", str(total_s)])
"""
LOAD = """
from cxr_triton.client.wire import infer_request
from cxr_triton.perf.load import Load, offer

messages = [infer_request("cxr_reader", [b"x"], {"prompt": f"bench {how}"}, 2).SerializeToString()]
if how == "interrupted":
    interrupt()
timeout_s = min(connect_s, total_s)
records, failed = offer(url, messages, Load("concurrency", 3), min_seconds=0, min_requests=3, timeout_s=timeout_s)
if failed:
    raise failed
"""
BACKEND = """
import numpy as np
from cxr_triton.engines.tensorrt_llm.backend import TensorRTLLMBackend

backend, ended = TensorRTLLMBackend(url), threading.Event()
def listen(name, tokens, is_last, error):
    ended.set()
backend.start("a", {"prompt": np.frombuffer(how.ljust(12).encode(), np.int32)}, listen)
if how != "abandoned":
    assert ended.wait(60)
"""
GATEWAY = """
import asyncio, io, sqlite3, tempfile, time
from pathlib import Path
import numpy as np
from cxr_triton import phantom, phantom_file
from cxr_triton.client.gateway.config import load_config
from cxr_triton.client.gateway.log import Log, Metrics
from cxr_triton.client.gateway.read import ReadWorker
from cxr_triton.client.gateway.schema import Received
from cxr_triton.client.gateway.store import Store

async def run(storage):
    (storage / "image.dcm").write_bytes(phantom_file.write_dicom(phantom.draw(np.random.default_rng(1))))
    (storage / "gateway.yaml").write_text(
        f"storage: {storage}\\nfolder: {{path: {storage}/in}}\\n"
        f"read: {{url: '{url}', task: {how}, total_s: {total_s}}}\\n"
        "destinations: [{name: pacs, aet: PACS, host: 127.0.0.1}]\\n"
    )
    config = load_config(storage / "gateway.yaml")
    store = Store(config.queue_url, config.name)
    names = ("sop_instance", "digest", "sop_class", "study", "series", "transfer_syntax", "patient", "view", "taken")
    image = dict.fromkeys(names, "1") | {"kind": "image", "number": 1, "bytes": 1, "path": "image.dcm", "source": "me"}
    store.add(Received(**image), 0, 0)
    metrics = Metrics(store.counts, lambda: 0)
    worker, stopping = ReadWorker(config, store, Log(config, io.StringIO()), metrics, lambda: None), asyncio.Event()
    running = asyncio.create_task(worker.run(stopping))
    ends = time.monotonic() + (1 if how in ("unreachable", "abandoned") else 60)
    states, awaited = [], {"abandoned": 3}.get(how, 4)
    while time.monotonic() < ends and len(states) < awaited:
        await asyncio.sleep(0.05)
        states = [step["state"] for step in store.job(1)["history"]]
    stopping.set()
    await running
    store.close()

with tempfile.TemporaryDirectory() as storage:
    asyncio.run(run(Path(storage)))
"""
HOW = ("success", "refused", "broken", "unreachable", "timeout", "interrupted", "abandoned")
PROGRAMS = {
    "reader": (READER, HOW),
    "with reader": (WITH_READER, HOW),
    "aio": (AIO, HOW),
    "with aio": (WITH_AIO, HOW),
    "read": (VERB, HOW[:-1]),
    "load": (LOAD, HOW[:-1]),
    "backend": (BACKEND, ("refused", "broken", "unreachable", "abandoned")),
    "gateway": (GATEWAY, ("success", "refused", "broken", "unreachable", "timeout", "abandoned")),
}


def answer(request, context):
    prompt = b"".join(request.raw_input_contents)
    if b"refused" in prompt:
        yield failure("[INVALID_REQUEST] the test said so")
    elif b"success" in prompt:
        yield response(TEXT)
        yield response("", BENCH_READING if b"bench" in prompt else READING)
    else:
        yield response("text")
        if b"broken" in prompt:
            context.abort(grpc.StatusCode.INTERNAL, "the test said so")
        pause(context, 30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "how"),
    [(name, how) for name, (_, ways) in PROGRAMS.items() for how in ways],
)
def test_nothing_of_grpc_is_alive_when_the_interpreter_ends(program, how):
    with FakeServer(answer) as server:
        url = "127.0.0.1:9" if how == "unreachable" else server.url
        command = [sys.executable, "-c", REPORT + PROGRAMS[program][0], url, how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    fails = how not in ("success", "abandoned") and program not in ("backend", "gateway")
    assert (done.returncode != 0) == fails, done.stderr
    assert done.stderr.splitlines()[-1] == "alive:", done.stderr
