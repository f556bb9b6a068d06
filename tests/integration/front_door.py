"""How many calls without credentials, or to another API, get through the front door, and what it costs a reading.

    python tests/integration/front_door.py --calls 10000 --readings 200

Behind a door by tokens and one by certificates is a server that takes any call and counts them. Then a real Triton,
with a small model of random weights, reads one picture again and again, in turn by itself and through each door.
docs/results/front-door.json takes the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from front import Authority, FrontDoor
from reliability import provenance, set_section

RECORD = Path(__file__).resolve().parents[2] / "docs" / "results" / "front-door.json"
SERVICE = "/inference.GRPCInferenceService/"
CALLS = (
    "ModelStreamInfer",
    "ModelMetadata",
    "ModelConfig",
    "ModelReady",
    "ServerMetadata",
    "ServerReady",
    "ServerLive",
)
OTHERS = (
    "ModelInfer", "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
    "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings", "modelStreamInfer",
    "ModelStreamInfer/", "ServerReady?a", "../metrics", "",
)  # fmt: skip
PATHS = [SERVICE + name for name in OTHERS] + ["/", "/token", "/v2/models", "/grpc.health.v1.Health/Check"]
LIFTED = {"limit_req_zone": "$binary_remote_addr zone=calls:1m rate=100000r/s"}


class Counting(grpc.GenericRpcHandler):
    """A server that answers every call, and counts them by method."""

    def __init__(self):
        self.came: Counter[str] = Counter()
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=[self])
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def service(self, details):
        self.came[details.method] += 1
        return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")

    def __enter__(self) -> Counting:
        self._server.start()
        return self

    def __exit__(self, *exc) -> None:
        self._server.stop(0).wait()


def wrong_metadata(door: FrontDoor, ended: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """What a call may bring in place of a token that holds."""
    token = door.token
    values = {
        "an ended token": f"Bearer {ended}", "another token": "Bearer " + "a" * len(token), "no token": "Bearer ",
        "most of a token": f"Bearer {token[:-1]}", "more than a token": f"Bearer {token}x", "a digest": _digest(door),
        "another case": f"Bearer {token.swapcase()}", "another scheme": f"Basic {token}", "no scheme": token,
    }  # fmt: skip
    wrong = [(name, [("authorization", value)]) for name, value in values.items()]
    return [*wrong, ("nothing", []), ("another header", [("x-authorization", f"Bearer {token}"), ("x-who", "test")])]


def _digest(door: FrontDoor) -> str:
    return f"Bearer {door.tokens.read_text().split()[1]}"


def trespass(folder: Path, calls: int, seed: int) -> dict:
    """Calls that nobody may make, by their kind: how many were made, and how many of them a server saw."""
    made, let_in, ended_as, draw = Counter(), Counter(), Counter(), random.Random(seed)
    with Counting() as server, contextlib.ExitStack() as stack:
        door = stack.enter_context(FrontDoor(folder / "tokens", [server.url], limits=LIFTED))
        locked = stack.enter_context(FrontDoor(folder / "mtls", [server.url], auth="mtls", limits=LIFTED))
        good = [("authorization", f"Bearer {door.token}")]
        kinds = [
            (f"{name}, by tokens", door, None, CALLS, m)
            for name, m in wrong_metadata(door, door.add_token("e", "--days", "-1"))
        ]
        kinds.append(("another API, with a token", door, None, PATHS, good))
        cert, ended = locked.ca.sign("client"), locked.ca.sign("ended", days=-1)
        strange = Authority(folder / "other").sign("client")
        kinds.append(("another API, with a certificate", locked, cert, PATHS, []))
        certs = {"no certificate": None, "an ended certificate": ended, "a strange certificate": strange}
        kinds += [(name, locked, pair, CALLS, []) for name, pair in certs.items()]
        for allowed, pair, metadata in ((door, None, good), (locked, cert, [])):
            with _channel(allowed, pair) as channel:
                assert _call(channel, SERVICE + "ServerReady", metadata) == "OK"
        server.came.clear()
        while sum(made.values()) < calls:
            name, at, pair, paths, metadata = draw.choice(kinds)
            before = server.came.total()
            with _channel(at, pair) as channel:
                for _ in range(min(20, calls - sum(made.values()))):
                    path = draw.choice(paths)
                    ended_as[_call(channel, path if path[:1] == "/" else SERVICE + path, metadata)] += 1
                    made[name] += 1
            let_in[name] += server.came.total() - before
    return {
        "calls": made.total(),
        "got_through": let_in.total(),
        "by_kind": {name: {"calls": made[name], "got_through": let_in[name]} for name in sorted(made)},
        "ended_as": dict(sorted(ended_as.items())),
        "limits": "as shipped, but for the rate of calls, which was lifted",
    }


def _channel(door: FrontDoor, pair) -> grpc.Channel:
    own = [file.read_bytes() for file in pair] if pair else [None, None]
    options = [("grpc.use_local_subchannel_pool", 1)]
    credentials = grpc.ssl_channel_credentials(door.ca.cert.read_bytes(), own[1], own[0])
    return grpc.secure_channel(door.url, credentials, options)


def _call(channel: grpc.Channel, path: str, metadata) -> str:
    try:
        channel.unary_unary(path)(b"", metadata=metadata, timeout=10)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def cost(folder: Path, url: str, readings: int, picture: bytes) -> dict:
    """Wall clock of a reading by itself and through each door, in turn; ms."""
    from cxr_triton.client import Reader, Tls

    took: dict[str, list[float]] = {"direct": [], "tokens": [], "certificates": []}
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(FrontDoor(folder / "tokens", [url]))
        locked = stack.enter_context(FrontDoor(folder / "mtls", [url], auth="mtls"))
        readers = {
            "direct": Reader(url),
            "tokens": Reader(door.url, tls=Tls(door.ca.cert), token_file=door.token_file),
            "certificates": Reader(locked.url, tls=Tls(locked.ca.cert, *locked.ca.sign("client"))),
        }
        for reader in readers.values():
            stack.enter_context(reader)
        for turn in range(readings + 3):
            for name in random.Random(turn).sample(sorted(readers), len(readers)):
                began_s = time.monotonic()
                readers[name].read([picture], max_new_tokens=8, temperature=0.0).result()
                if turn >= 3:
                    took[name].append(1e3 * (time.monotonic() - began_s))
    result = {"readings_each": readings, "picture_bytes": len(picture), "ms": {n: _spread(v) for n, v in took.items()}}
    for name in ("tokens", "certificates"):
        added = [through - direct for through, direct in zip(took[name], took["direct"], strict=True)]
        result[f"{name}_add_ms"] = {
            "p50": round(median(took[name]) - median(took["direct"]), 3),
            "p50_of_pairs": round(median(added), 3),
        }
    return result


def _spread(values: list[float]) -> dict[str, float]:
    quarter, half, more = quantiles(values, n=4)
    return {"p25": round(quarter, 3), "p50": round(half, 3), "p75": round(more, 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--readings", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20)
    given = parser.parse_args()
    from served import radiograph, write_bundle

    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    command = f"python tests/integration/front_door.py --calls {given.calls} --readings {given.readings}"
    begun = provenance(command, ["grpcio", "nvidia-pytriton"], ["nginx-light", "openssl"])
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        begun["trespass"] = trespass(folder / "trespass", given.calls, given.seed)
        write_repository(write_bundle(folder), folder / "repository", Settings(threads=1), unverified=True)
        with Server(folder / "repository", grpc_port=0, metrics_port=0) as server:
            begun["cost"] = cost(folder / "cost", server.grpc, given.readings, radiograph(1))
    print(json.dumps(begun, indent=2))
    set_section("front_door", begun, RECORD)
    sys.exit(bool(begun["trespass"]["got_through"]))


if __name__ == "__main__":
    main()
