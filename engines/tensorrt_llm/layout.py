"""Where an engine of TensorRT-LLM lies in a bundle, and which containers build and run it."""

from __future__ import annotations

from pathlib import Path

NAME = "tensorrt-llm"
FOLDER, FILES = "tensorrt_llm", ("config.json", "rank0.engine")
"""Folder of a bundle with what `trtllm-build` wrote, and nothing else."""
CONTAINERS = {
    "26.03-trtllm-python-py3": "1.2.0",
    **dict.fromkeys((f"26.0{month}-trtllm-python-py3" for month in (4, 5, 6, 7)), "1.2.1"),
}
"""TensorRT-LLM of the containers whose `trtllm-build` is known here: 1.2, the last that has one."""
DRIVER = "590.44.01"
"""Least driver for CUDA 13.1, which those containers have."""
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
"""What the loaded driver says of itself."""
TRITON = Path("/opt/tritonserver")
"""Triton in NVIDIA's containers."""


def step_tokens(slots: int, max_sequence: int) -> int:
    """Most tokens of one step: the longest prompt, and a token of every other stream."""
    return min(max_sequence + slots, max_sequence * slots)
