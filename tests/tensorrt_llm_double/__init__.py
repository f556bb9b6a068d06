"""A contract double of TensorRT-LLM's C++ backend, for tests on machines that have none. It shows nothing about speed.

`write_bundle` makes a bundle whose engine it stands in for; `install` puts it into a packaged repository in place of
the model `tensorrt_llm`, and changes nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

HERE = Path(__file__).parent


def write_bundle(
    folder: Path,
    checkpoint: Path,
    export: Path,
    *,
    dtype: str = "bfloat16",
    max_batch: int = 8,
    plan: bool = False,
) -> Path:
    """A bundle as `cxr-triton build` leaves it for a tensorrt-llm recipe, around an engine that holds nothing.

    Parameters
    ----------
    folder : Path
        Of the bundle; its sibling ``trtllm`` gets the decoder's checkpoint, which the double reads.
    checkpoint : Path
        Hugging Face checkpoint.
    export : Path
        What `cxr-triton export` made of it.
    dtype : str
        Type of the engine.
    max_batch : int
    plan : bool
        The vision encoder is a TensorRT plan, which holds nothing either, and not an ONNX graph.
    """
    from cxr_triton.engines.bundle import SIDE_FILES
    from cxr_triton.engines.tensorrt_llm.layout import FOLDER
    from cxr_triton.export.checkpoint import Checkpoint
    from cxr_triton.export.tensorrt_llm import write_tensorrt_llm

    exported = json.loads((export / "export.json").read_text())
    geometry = exported["geometry"] | ({"compute": "bf16"} if plan else {})
    context = geometry["max_sequence"]
    weights = folder.parent / "trtllm"
    if not weights.exists():
        write_tensorrt_llm(Checkpoint(checkpoint), weights, precision="bf16", max_position_embeddings=context)
    (folder / FOLDER).mkdir(parents=True)
    model = json.loads((weights / "config.json").read_text()) | {"dtype": dtype}
    build = {
        "max_batch_size": max_batch,
        "max_num_tokens": context,
        "max_seq_len": context,
        "max_input_len": 1024,
        "max_prompt_embedding_table_size": max_batch * 2 * geometry["token_budget"],
        "kv_cache_type": "paged",
    }
    config = {"version": "1.2.1", "pretrained_config": model, "build_config": build}
    (folder / FOLDER / "config.json").write_text(json.dumps(config))
    (folder / FOLDER / "rank0.engine").write_text("no engine")
    vision = ["vision.onnx", "vision.onnx.data"]
    for name in (*SIDE_FILES, *([] if plan else vision)):
        shutil.copy(export / name, folder / name)
    if plan:
        (folder / "vision.plan").write_text("no plan")
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {
        "schema": 1,
        "engine": "tensorrt-llm",
        "vision_engine": "tensorrt" if plan else "onnxruntime",
        "precision": "bf16",
        "head": "compute",
        "recipe": {"image_budget": 4, "decoder": {"kv_share": 0.5}},
        "versions": {"cxr_triton": "0", "tensorrt-llm": "1.2.1", "tensorrt": "10.14.1.48", "onnxruntime": "1.24"},
        "source": exported["source"],
        "geometry": geometry,
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for name, path in files.items()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def install(repository: Path, weights: Path, log: Path, **parameters: str) -> None:
    """Swap the backend of the model `tensorrt_llm` for the double; its tensors and parameters stay.

    Parameters
    ----------
    repository : Path
    weights : Path
        The decoder's checkpoint as `trtllm-build` takes it.
    log : Path
        What it was asked, a line of JSON for each request and each stop.
    **parameters : str
        Of the model; ``double_step_s`` slows its steps down.
    """
    values = {"double_weights": str(weights), "double_log": str(log), "double_tests": str(HERE.parent), **parameters}
    swap(repository, "tensorrt_llm", HERE / "model.py", backend="python", platform="", **values)


def swap(repository: Path, name: str, code: Path, *, backend: str, platform: str, **parameters: str) -> None:
    """Give a packaged model another backend, one that needs no GPU."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

    path = repository / name / "config.pbtxt"
    config = text_format.Parse(path.read_text(), ModelConfig())
    config.backend, config.platform = backend, platform
    for group in config.instance_group:
        group.kind = ModelInstanceGroup.KIND_CPU
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    path.write_text(text_format.MessageToString(config))
    shutil.copy(code, repository / name / "1" / "model.py")
