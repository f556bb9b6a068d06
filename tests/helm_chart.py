"""The chart of deploy/helm as Helm renders it, and the values that tests render it with.

Helm runs in a process of its own. It is a library in Go, whose runtime takes the signals from Python: with it in the
process, a write to a connection that the other end closed is a segmentation fault without a trace.
"""

import functools
import importlib.util
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy" / "helm" / "cxr-triton"

PEERS = [{"aet": "PACS", "addresses": ["10.1.0.0/16"]}]
PACS = {"name": "pacs", "kind": "dicom", "aet": "PACS", "host": "pacs.example", "port": 104}
GATEWAY = {"enabled": True, "dicom": {"peers": PEERS}, "config": {"destinations": [PACS]}}
DATABASE = {"host": "db.example", "secretName": "database", "caSecret": "database-ca"}
OWN = {"recipe": "own", "server": {"image": {"tag": "own"}, "slots": 4, "gpu": {"count": 0}}}

VALUES = {
    "defaults": {},
    "tensorrt-llm on an L40S": {"recipe": "l40s-fp8-trtllm", "server": {"gpu": {"product": "NVIDIA-L40S"}}},
    "own recipe on CPUs": OWN,
    "pinned images": {
        "imagePullSecrets": ["registry"],
        "server": {"image": {"repository": "registry.example/serve", "digest": "sha256:" + "a" * 64}},
    },
    "repository in a folder of a claim": {"repository": {"claim": "models", "subPath": "nv-reason/1"}},
    "repository as an image": {"repository": {"claim": "", "image": "registry.example/repository:1"}},
    "repository copied from an image": {
        "repository": {"claim": "", "init": {"image": "registry.example/repository:1", "size": "20Gi"}},
    },
    "door by token": {"frontDoor": {"auth": "token"}},
    "door by certificate and token, for the world": {
        "frontDoor": {
            "auth": "both",
            "service": {"type": "LoadBalancer", "annotations": {"a/b": "c"}, "sourceRanges": ["10.0.0.0/8"]},
        },
        "networkPolicy": {"clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
    },
    "door with files of one's own": {"frontDoor": {"configMap": "own-door", "replicas": 1}},
    "keda": {"autoscaling": {"kind": "keda", "max": 8}},
    "hpa": {"autoscaling": {"kind": "hpa", "streams": 20}},
    "kserve": {"server": {"kind": "kserve", "replicas": 2, "annotations": {"a/b": "c"}}},
    "kserve with keda, repository copied": {
        "server": {"kind": "kserve"},
        "autoscaling": {"kind": "keda"},
        "repository": {"claim": "", "init": {"image": "registry.example/repository:1"}},
    },
    "gateway on SQLite": {"gateway": GATEWAY},
    "gateways on PostgreSQL": {
        "gateway": {
            **GATEWAY,
            "count": 2,
            "postgresql": DATABASE,
            "storage": {"accessModes": ["ReadWriteMany"], "className": "shared"},
            "dicom": {"aet": "CXR", "peers": PEERS, "tlsSecret": "dicom-tls"},
            "service": {"type": "LoadBalancer", "port": 104, "sourceRanges": ["10.1.0.0/16"]},
            "egress": [{"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "ports": [{"protocol": "TCP", "port": 104}]}],
            "config": {"destinations": [PACS], "read": {"concurrency": 8}, "group": {"quiet_s": 5}},
        },
        "networkPolicy": {"dicom": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "clients": [{"podSelector": {}}]},
    },
    "gateway by token": {"frontDoor": {"auth": "token"}, "gateway": GATEWAY},
    "gateway by certificate and token of its own": {
        "frontDoor": {"auth": "both"},
        "gateway": {**GATEWAY, "tokenSecret": "lung-token", "clientCertSecret": "lung-client"},
        "tls": {"certManager": {"enabled": True, "issuer": {"name": "own"}, "clientIssuer": {"name": "clients"}}},
    },
    "gateway without a door": {
        "frontDoor": {"enabled": False},
        "gateway": {
            **GATEWAY,
            "through": "server",
            "storage": {"claim": "storage"},
            "secrets": [{"name": "archive", "key": "token", "file": "archive.token"}],
            "config": {
                "destinations": [
                    {
                        "name": "archive",
                        "kind": "stow",
                        "url": "https://archive.example/dicom-web",
                        "token_file": "/etc/cxr-gateway/secrets/archive.token",
                    }
                ],
                "web": {"max_connections": 8},
            },
        },
    },
    "everything that a cluster may have": {
        "nameOverride": "chest",
        "gateway": GATEWAY,
        "autoscaling": {"kind": "keda"},
        "tls": {
            "certManager": {
                "enabled": True,
                "issuer": {"name": "hospital", "kind": "ClusterIssuer"},
                "clientIssuer": {"name": "clients"},
                "dnsNames": ["cxr.hospital.example"],
            }
        },
        "monitoring": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboards": {"enabled": True},
        },
        "server": {
            "antiAffinity": "hard",
            "secretName": "seal",
            "nodeSelector": {"pool": "gpu"},
            "priorityClassName": "high",
            "runtimeClassName": "nvidia",
            "probes": {"reading": False},
        },
    },
    "spans for a collector": {
        "gateway": {**GATEWAY, "postgresql": DATABASE, "egress": [{"ports": [{"protocol": "TCP", "port": 104}]}]},
        "tracing": {"collector": "http://collector.monitoring:4318"},
        "networkPolicy": {"collector": [{"podSelector": {"matchLabels": {"app": "collector"}}}]},
    },
    "no network policies, no budget, no spare GPU": {
        "networkPolicy": {"enabled": False},
        "server": {
            "spareGpu": False,
            "antiAffinity": "none",
            "disruption": {"enabled": False},
            "gpu": {"byLabels": False},
        },
    },
}


class HelmRefused(Exception):
    """What Helm says of values that it does not render."""


def is_there():
    return importlib.util.find_spec("helm_python") is not None


@functools.cache
def _process():
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


@functools.cache
def _chart(path):
    import helm_python

    return helm_python.Chart.load(path)


def _render(path, values):
    import helm_python

    try:
        return _chart(path).render(values, name="lung", namespace="radiology", is_install=True)
    except helm_python.HelmError as error:
        raise HelmRefused(str(error)) from None


def _lint(path):
    import helm_python

    return helm_python.lint(path, strict=True)


def render(values, path=CHART):
    """Texts by the name of the file.

    Raises
    ------
    HelmRefused
    """
    return _process().submit(_render, path, values).result()


def lint():
    return _process().submit(_lint, CHART).result()


def objects(files):
    texts = [text for name, text in files.items() if not name.endswith("NOTES.txt")]
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


def one(found, kind, name):
    (only,) = (each for each in found if each["kind"] == kind and each["metadata"]["name"] == name)
    return only


def pods(found):
    """Pod specs: of Deployments, and of an InferenceService with its ServingRuntime."""
    for each in found:
        if each["kind"] == "Deployment":
            yield each["spec"]["template"]["spec"]
        elif each["kind"] == "InferenceService":
            (runtime,) = (other for other in found if other["kind"] == "ServingRuntime")
            own = {"annotations", "labels", "model", "minReplicas", "maxReplicas", "deploymentStrategy"}
            spec = {key: value for key, value in each["spec"]["predictor"].items() if key not in own}
            yield {**spec, "containers": runtime["spec"]["containers"]}
