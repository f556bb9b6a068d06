"""A model repository of the test double `scripted_reader`, requests for it, and the load client measured against it."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from cxr_triton.client import wire
from cxr_triton.perf import load
from cxr_triton.perf.summary import summarize
from cxr_triton.perf.workload import Image, Images, Item, Spec, Workload
from cxr_triton.triton_repo.integrity import seal


def write_repository(folder: Path) -> Path:
    """A model repository whose only model is the double, under the name of the ensemble."""
    model = folder / "cxr_reader"
    shutil.copytree(Path(__file__).parent / "scripted_reader", model)
    config = ModelConfig(name="cxr_reader", backend="python")
    config.model_transaction_policy.decoupled = True
    config.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)
    for tensors, names in ((config.input, ("IMAGES", "REQUEST")), (config.output, ("DELTA", "READING"))):
        for name in names:
            dims = [-1] if name == "IMAGES" else [1]
            tensors.add(name=name, data_type=DataType.Value("TYPE_STRING"), dims=dims)
    (model / "config.pbtxt").write_text(text_format.MessageToString(config))
    seal(folder)
    return folder


def workload(image_bytes: int, **script) -> Workload:
    """One request of so many bytes, with a script for the answer."""
    spec = Spec(name="scripted", version=1, description="A test double's.", count=1, images=Images(), requests=())
    image = Image("zeros", b"\0" * image_bytes)
    return Workload(spec, (Item((image,), {"prompt": json.dumps(script)}),))


def offered(url: str, messages: list[bytes], concurrency: int, *, seconds: float = 0.0, requests: int = 1) -> load._Run:
    """A closed loop that ended without a failure."""
    run = load._Run(url, messages, load.Load("concurrency", concurrency), seconds, requests)
    run.run()
    if run.failure:
        raise run.failure
    return run


def timestamps_ms(url: str, script: dict, *, streams: int, requests: int) -> dict[str, list[float]]:
    """How much later than the server sent it the client says that each text came; both read the same clock.

    ``late`` has that, ``server_late`` how much later than it was due the server sent it, if it says so.
    """
    messages = [item.message("cxr_reader") for item in workload(1 << 10, **script).items]
    run = offered(url, messages, streams, requests=requests)
    late, server_late = [], []
    for exchange in run.exchanges:
        for at_s, response in zip(exchange.arrived_s, exchange.responses, strict=True):
            text, _ = wire.parse_response(pb.ModelStreamInferResponse.FromString(response))
            if text:
                sent_s, *due_s = map(float, text.split())
                late.append(1e3 * (run.began_s + at_s - sent_s))
                server_late += [1e3 * (sent_s - each) for each in due_s]
    return {"late": late, "server_late": server_late}


def overhead(url: str, *, image_bytes: int, responses: int, concurrency: int, seconds: float) -> dict:
    """Requests a second that were answered, and the client's processor time for each while the load was offered."""
    messages = [item.message("cxr_reader") for item in workload(image_bytes, responses=responses).items]
    before = resource.getrusage(resource.RUSAGE_SELF)
    run = offered(url, messages, concurrency, seconds=seconds, requests=3)
    after = resource.getrusage(resource.RUSAGE_SELF)
    records = [load.record(exchange) for exchange in run.exchanges]
    assert all(len(record.deltas_s) == responses for record in records)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "concurrency": concurrency,
        "requests": len(records),
        "per_s": summarize(records, {})["readings_per_s"],
        "client_cpu_s_per_request": cpu_s / len(records),
    }
