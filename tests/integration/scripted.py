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
    return folder


def workload(image_bytes: int, **script) -> Workload:
    """One request of so many bytes, with a script for the answer."""
    spec = Spec(name="scripted", version=1, description="A test double's.", count=1, images=Images(), requests=())
    image = Image("zeros", b"\0" * image_bytes)
    return Workload(spec, (Item((image,), {"prompt": json.dumps(script)}),))


def timestamp_errors_ms(url: str, script: dict, *, streams: int, requests: int) -> list[float]:
    """How much later than the server sent it the client says that each text came; both read the same clock.

    The way through Triton and gRPC is part of it, so the client's own error is less.
    """
    messages = [item.message("cxr_reader") for item in workload(1 << 10, **script).items]
    run = load._Run(url, messages, load.Load("concurrency", streams), 0.0, requests, 0, 600.0)
    run.run()
    if run.failure:
        raise run.failure
    errors = []
    for exchange in run.exchanges:
        for at_s, response in zip(exchange.arrived_s, exchange.responses, strict=True):
            sent, _ = wire.parse_response(pb.ModelStreamInferResponse.FromString(response))
            if sent:
                errors.append(1e3 * (run.began_s + at_s - float(sent)))
    return errors


def overhead(url: str, *, image_bytes: int, responses: int, concurrency: int, seconds: float) -> dict:
    """What the client spends on a request, beside what a server that does no work takes for it."""
    messages = [item.message("cxr_reader") for item in workload(image_bytes, responses=responses).items]
    before = resource.getrusage(resource.RUSAGE_SELF)
    records, failure = load.offer(
        url, messages, load.Load("concurrency", concurrency), min_seconds=seconds, min_requests=3
    )
    after = resource.getrusage(resource.RUSAGE_SELF)
    if failure:
        raise failure
    assert all(len(record.deltas_s) == responses for record in records)
    cpu_s = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(records)
    served_per_s = summarize(records, {})["readings_per_s"]
    return {
        "image_bytes": image_bytes,
        "responses": responses,
        "concurrency": concurrency,
        "requests": len(records),
        "served_per_s": served_per_s,
        "client_cpu_s_per_request": cpu_s,
        "client_could_offer_per_s": 1 / cpu_s,
        "ratio": 1 / cpu_s / served_per_s,
    }
