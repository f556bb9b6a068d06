"""Chest X-ray reasoning models, from checkpoint to a served, measured, verified Triton ensemble."""

import os

__version__ = "0.1.0"

SILENT = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
}
"""Libraries that report to their makers unless the environment says no before they are imported: ONNX Runtime sends
names and digests of models. What the environment says already stays."""

for _name, _value in SILENT.items():
    os.environ.setdefault(_name, _value)
