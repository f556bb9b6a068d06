#!/usr/bin/env python3
"""A test double of TensorRT-LLM 1.2's `trtllm-build`: knows its flags, speaks its log, writes files of its form.

No engine comes out. `FAKE_TRTLLM_BUILD` says what goes wrong; a file named by `FAKE_TRTLLM_PIDS` gets the process ids.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

VERSION = "1.2.1"
SWITCH = ("enable", "disable")
DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable")
FAILURES = {  # last lines of logs in TensorRT-LLM's issues; #346, #102, #54 and others
    "gpu_memory": "[E] 2: [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (no further "
    "information)\n[TRT-LLM] [E] Engine building failed, please check the error log.",
    "host_memory": "MemoryError: std::bad_alloc",
    "plugin": "[TRT] [E] IPluginRegistry::getCreator: Error Code 4: API Usage Error (Cannot find plugin: GPTAttention, "
    "getPluginCreator could not find plugin)",
    "library": "ImportError: libnvinfer.so.10: cannot open shared object file: No such file or directory",
    "sm": "RuntimeError: INT8/INT4 quantization is not supported on SM>=100.",
    "checkpoint": "RuntimeError: Required but not provided tensors:{'transformer.layers.0.attention.qkv.bias'}",
    "shape": "AssertionError: The value updated is not the same shape as the original. Updated: (2, 3), original: (3,)",
    "gpu": "RuntimeError: Found no NVIDIA driver on your system.",
    "disk": "OSError: [Errno 28] No space left on device",
    "kernel": "[TRT] [E] 10: Could not find any implementation for node {ForeignNode[QWenForCausalLM/layers/0/ln_2]}.",
    "unknown": "[11/22/2026-09:00:00] [TRT] [W] UNSUPPORTED_STATESkipping tactic 2 due to insufficient memory on "
    "requested size of 33555480576 detected for tactic 0x1e.\nRuntimeError: something that nobody has seen",
}


def parser() -> argparse.ArgumentParser:
    """The flags of `commands/build.py` and `plugin/plugin.py` that matter to a decoder on one GPU."""
    flags = argparse.ArgumentParser(prog="trtllm-build", allow_abbrev=False)
    for name in ("checkpoint_dir", "output_dir", "model_config", "build_config", "input_timing_cache"):
        flags.add_argument(f"--{name}")
    flags.add_argument("--output_timing_cache", default="model.cache")
    for name, default in (
        ("max_batch_size", 2048),
        ("max_input_len", 1024),
        ("max_beam_width", 1),
        ("max_num_tokens", 8192),
        ("opt_num_tokens", None),
        ("workers", 1),
        ("tokens_per_block", 32),
    ):
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--max_seq_len", "--max_decoder_seq_len", type=int)
    flags.add_argument("--max_prompt_embedding_table_size", "--max_multimodal_len", type=int, default=0)
    flags.add_argument("--kv_cache_type", choices=("continuous", "paged", "disabled"))
    flags.add_argument("--log_level", default="info", choices=("error", "warning", "info", "verbose", "debug"))
    flags.add_argument("--logits_dtype", choices=("float16", "float32"))
    for name in ("gpt_attention_plugin", "gemm_plugin"):
        flags.add_argument(f"--{name}", choices=DTYPES, default="auto" if name[0:3] == "gpt" else None)
    for name, default in (
        ("context_fmha", "enable"),
        ("remove_input_padding", "enable"),
        ("use_paged_context_fmha", "enable"),
        ("use_fp8_context_fmha", "enable"),
        ("use_fused_mlp", "enable"),
        ("multiple_profiles", "disable"),
    ):
        flags.add_argument(f"--{name}", choices=SWITCH, default=default)
    return flags


def say(line: str, source: str = "TRT-LLM") -> None:
    print(f"[11/22/2026-09:00:00] [{source}] [I] {line}", flush=True)


def main() -> int:
    asked, failure = parser().parse_args(), os.environ.get("FAKE_TRTLLM_BUILD", "")
    print(f"[TensorRT-LLM] TensorRT-LLM version: {VERSION}", flush=True)
    say(f"Set gpt_attention_plugin to {asked.gpt_attention_plugin}.")
    model = json.loads((Path(asked.checkpoint_dir) / "config.json").read_text())
    quantization = model["quantization"]
    say("Set nccl_plugin to None.")
    say("Total time of constructing network from module object 2.794 seconds")
    say("Build TensorRT engine Unnamed Network 0")
    out = Path(asked.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    if pids := os.environ.get("FAKE_TRTLLM_PIDS"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (out / "rank0.engine").write_bytes(b"half")
        Path(pids).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    if failure == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if failure in FAILURES:
        (out / "rank0.engine").write_bytes(b"half")
        print(FAILURES[failure], flush=True)
        return 1
    say("Engine generation completed in 16.3055 seconds.", "TRT")
    say("Total time of building Unnamed Network 0: 00:00:16")
    if asked.input_timing_cache:
        say(f"Timing cache of {Path(asked.input_timing_cache).read_text()!r}")
    Path(asked.output_timing_cache).write_text("kernel times")
    say(f"Timing cache serialized to {asked.output_timing_cache}")
    say(f"Serializing engine to {out / 'rank0.engine'}...")
    switches = {name: value == "enable" for name, value in vars(asked).items() if value in SWITCH}
    if quantization["quant_algo"] != "FP8" or quantization["kv_cache_quant_algo"] != "FP8":
        switches["use_fp8_context_fmha"] = False  # as builder.build does, with a warning
    if failure == "override":
        switches["use_paged_context_fmha"] = False
    build = {
        "max_batch_size": asked.max_batch_size,
        "max_num_tokens": asked.max_num_tokens,
        "max_input_len": asked.max_input_len,
        "max_seq_len": asked.max_seq_len or model["max_position_embeddings"],
        "max_beam_width": asked.max_beam_width,
        "max_prompt_embedding_table_size": asked.max_prompt_embedding_table_size,
        "kv_cache_type": (asked.kv_cache_type or "paged").upper(),
        "use_mrope": model["qwen_type"] == "qwen2_vl" and failure != "no_mrope",
        "plugin_config": {
            **switches,
            "gpt_attention_plugin": asked.gpt_attention_plugin,
            "gemm_plugin": asked.gemm_plugin,
            "tokens_per_block": asked.tokens_per_block,
        },
    }
    if failure == "other_limits":
        build["max_batch_size"] //= 2
    version = "1.2.0" if failure == "other_version" else VERSION
    whole = {"version": version, "pretrained_config": model, "build_config": build}
    (out / "config.json").write_text(json.dumps(whole, indent=4))
    if failure != "no_engine":
        (out / "rank0.engine").write_bytes(b"a test double's engine: " + " ".join(sys.argv[1:]).encode())
    say("Engine serialized. Total time: 00:00:00")
    say("Total time of building all engines: 00:00:41")
    return 0


if __name__ == "__main__":
    sys.exit(main())
