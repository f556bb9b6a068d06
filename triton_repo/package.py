"""A deployable Triton model repository from an engine bundle.

`config.pbtxt` is made from Triton's own protobuf messages, so it is valid by construction. The bundle lies in
``decoder/1/bundle``, where Triton takes it for no model; all models find it by a path relative to the repository, which
can therefore be moved.

For a bundle with TensorRT-LLM's engine two models run in NVIDIA's backends: `tensorrt_llm`, which `decoder` calls, and
`vision_encoder` as a TensorRT plan. Such a server has to be started in the repository's folder.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cxr_triton.engines.bundle import MANIFEST, Bundle
from cxr_triton.engines.tensorrt_llm.request import EngineConfig
from cxr_triton.engines.verify.record import require_verified
from cxr_triton.errors import InvalidBundle, InvalidRequest, NotVerified
from cxr_triton.files import new_folder, require_new

BUNDLE = "decoder/1/bundle"
ENSEMBLE = "cxr_reader"
VERIFICATION = "VERIFICATION"
VISION_BATCH = 8  # images
MODELS = ("dicom_preprocess", "vision_encoder", "decoder", "report")
ENGINE = "tensorrt_llm"
SLOTS = 4
_ADAPTERS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a repository is served.

    Parameters
    ----------
    slots : int, optional
        Streams that decode at the same time; each takes a KV cache of the bundle's whole context. By default 4, and
        with TensorRT-LLM as many as its engine was built for.
    preprocess_instances : int
        Processes that decode images, each with a sandboxed child.
    threads : int
        CPU threads of each of the two graphs; 0 takes all cores.
    queue_size : int
        Requests that may wait before each of preprocessing, vision encoder and decoder; one more is QUEUE_FULL.
    batch_invariant : bool
        A reading never depends on what else runs, to the last bit; see `engines.session.DecoderSession`.
    prefix_reuse : bool
        TensorRT-LLM keeps KV blocks for prompts that begin alike, images included. Not proved with M-RoPE.
    """

    slots: int | None = None
    preprocess_instances: int = 2
    threads: int = 0
    queue_size: int = 64
    batch_invariant: bool = False
    prefix_reuse: bool = False

    def __post_init__(self):
        for name, least in (("slots", 1), ("preprocess_instances", 1), ("threads", 0), ("queue_size", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InvalidRequest(f"{name} is {value}, must be at least {least}")


def write_repository(
    bundle: str | Path, out: str | Path, settings: Settings, *, force: bool = False, unverified: bool = False
) -> Bundle:
    """Write a model repository; it appears complete or not at all.

    Parameters
    ----------
    bundle : path
        What ``cxr-triton build`` wrote. Its files are hard-linked where the file system allows it, else copied.
    out : path
        Must not exist or be an empty folder; with `force` also an older repository, which is replaced.
    settings : Settings
    unverified : bool
        Take a bundle that did not pass the verification gate too; the repository says so, in the file `VERIFICATION` of
        the ensemble and in the parameter ``verification`` of every model.

    Returns
    -------
    Bundle
        The one in the repository, every file of it checked.

    Raises
    ------
    InvalidRequest
        `out` is in use, or the bundle's engine does not do what `settings` ask for.
    InvalidBundle
        The bundle is damaged, or its engine is too small for its profile.
    NotVerified
        It has no passing record of the verification gate, and `unverified` is false.
    """
    source, out = Bundle.open(bundle, verify=False), Path(out).resolve()
    verification = _verification(source, unverified)
    from google.protobuf import text_format

    if not force:
        require_new(out, "choose another one or replace a repository with --force")
    used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if used and not (out / ENSEMBLE / "config.pbtxt").is_file():
        raise InvalidRequest(f"{out} holds no model repository, so --force does not replace it; remove it yourself")
    with new_folder(out, replaces=used) as new:
        for model in models(source, settings, verification[0]):
            (new / model.name / "1").mkdir(parents=True)
            (new / model.name / "config.pbtxt").write_text(text_format.MessageToString(model))
            if model.backend == "python":
                shutil.copyfile(_ADAPTERS / model.name / "1" / "model.py", new / model.name / "1" / "model.py")
            elif model.platform == "tensorrt_plan":
                _link(source.path / "vision.plan", new / model.name / "1" / "model.plan")
            else:  # Triton wants a version folder all the same, and an empty one gets lost in copies
                (new / model.name / "1" / "README").write_text("No file of its own; see config.pbtxt.\n")
        (new / ENSEMBLE / "1" / VERIFICATION).write_text("\n".join(verification) + "\n")
        (new / BUNDLE).mkdir()
        for file in (MANIFEST, *source.manifest["files"]):
            _link(source.path / file, new / BUNDLE / file)
        Bundle.open(new / BUNDLE)
    return Bundle.open(out / BUNDLE, verify=False)


def _verification(bundle: Bundle, unverified: bool) -> tuple[str, str]:
    """``passed`` or ``unverified``, and in words what that rests on."""
    try:
        record = require_verified(bundle)
    except NotVerified as error:
        if not unverified:
            raise
        return "unverified", f"Packaged with --unverified: {error.message.partition(';')[0]}."
    runtime = record["runtime"].get("said") or f"run in {record['runtime'].get('engine')}"
    return "passed", f"The verification gate passed on {record['made']}, {record['images']['count']} images, {runtime}."


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def models(bundle: Bundle, settings: Settings, verification: str) -> list:
    """``ModelConfig`` of each model and, last, the ensemble; each says how the bundle was verified."""
    on_tensorrt_llm = bundle.engine == "tensorrt-llm"
    if settings.prefix_reuse and not on_tensorrt_llm:
        raise InvalidRequest(f"prefix reuse was asked for, {bundle.engine} has none; use tensorrt-llm")
    tensors, threads, queue_size = _tensors(bundle), settings.threads, settings.queue_size
    preprocess = _python("dicom_preprocess", tensors, instances=settings.preprocess_instances, bundle=BUNDLE)
    if _has_plan(bundle):
        vision = _vision_plan(bundle, tensors)
    else:
        vision = _python("vision_encoder", tensors, bundle=BUNDLE, threads=threads)
        # A request's images arrive together and have to fit into one batch.
        vision.max_batch_size = max(bundle.profile.max_images, VISION_BATCH)
    if on_tensorrt_llm:
        engine = _engine(bundle, settings)
        chosen = {"slots": engine.max_batch_size, "prefix_reuse": int(settings.prefix_reuse)}
    else:
        chosen = {
            "slots": settings.slots or SLOTS,
            "threads": threads,
            "batch_invariant": int(settings.batch_invariant),
        }
    decoder = _python("decoder", tensors, bundle=BUNDLE, queue_size=queue_size, **chosen)
    report = _python("report", tensors)  # one instance: chunks have to stay in order
    for model in (preprocess, vision):
        model.dynamic_batching.default_queue_policy.max_queue_size = queue_size
    for tensor in decoder.input:  # STOP comes alone
        tensor.optional = True
    decoder.model_transaction_policy.decoupled = True
    result = [preprocess, vision, decoder, report, *([engine] if on_tensorrt_llm else []), _ensemble(bundle, tensors)]
    for model in result:
        model.parameters["verification"].string_value = verification
    return result


def _has_plan(bundle: Bundle) -> bool:
    """The vision encoder runs in Triton's TensorRT backend, and not in a session of ours."""
    return bundle.engine == "tensorrt-llm" and bundle.vision_engine == "tensorrt"


STEPS = {
    "dicom_preprocess": (
        ("IMAGES", "REQUEST"),
        (
            "PIXEL_WINDOWS",
            "PATCH_ROWS_COLS",
            "VALID",
            "MERGE_ORDER",
            "INPUT_IDS",
            "IMAGE_INDEX",
            "POSITION_IDS",
            "CONTEXT",
        ),
    ),
    "vision_encoder": (("PIXEL_WINDOWS", "PATCH_ROWS_COLS", "VALID", "MERGE_ORDER"), ("IMAGE_EMBEDDINGS",)),
    "decoder": (
        ("INPUT_IDS", "IMAGE_INDEX", "POSITION_IDS", "IMAGE_EMBEDDINGS", "CONTEXT"),
        ("TEXT", "TOKEN_IDS", "STREAM", "COMPLETION"),
    ),
    "report": (("TEXT", "STREAM", "COMPLETION"), ("DELTA", "READING")),
}
"""Tensors that each step takes and gives, in the order of the ensemble."""


def _tensors(bundle: Bundle) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor between the steps; images are the batch of `vision_encoder`."""
    geometry = bundle.geometry
    windows, tokens = geometry.window_budget, geometry.token_budget
    embeddings = geometry.compute.upper() if _has_plan(bundle) else "FP32"
    text = ("TYPE_STRING", [1])
    return {
        "IMAGES": ("TYPE_STRING", [-1]),
        "REQUEST": text,
        "PIXEL_WINDOWS": ("TYPE_UINT8", [-1, windows, 64, 588]),
        "PATCH_ROWS_COLS": ("TYPE_INT32", [-1, windows, 64, 2]),
        "VALID": ("TYPE_BOOL", [-1, windows, 64]),
        "MERGE_ORDER": ("TYPE_INT32", [-1, tokens]),
        "INPUT_IDS": ("TYPE_INT64", [-1]),
        "IMAGE_INDEX": ("TYPE_INT64", [-1]),
        "POSITION_IDS": ("TYPE_INT64", [3, -1]),
        "IMAGE_EMBEDDINGS": (f"TYPE_{embeddings}", [-1, tokens, geometry.hidden]),
        "CONTEXT": text,
        "STOP": text,
        "TEXT": text,
        "TOKEN_IDS": ("TYPE_INT32", [-1]),
        "STREAM": text,
        "COMPLETION": text,
        "DELTA": text,
        "READING": text,
    }


def _python(name: str, tensors: dict, *, instances: int = 1, **parameters):
    """A model of the Python backend with one process per instance."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

    model = ModelConfig(name=name, backend="python")
    model.instance_group.add(count=instances, kind=ModelInstanceGroup.KIND_CPU)
    for key, value in parameters.items():
        model.parameters[key].string_value = str(value)
    inputs, outputs = STEPS[name]
    if name == "decoder":
        inputs = (*inputs, "STOP")
    batched = name == "vision_encoder"  # Triton leaves the batch dimension out
    _declare(model, inputs, outputs, tensors, skip=1 if batched else 0)
    return model


def _vision_plan(bundle: Bundle, tensors: dict):
    """The plan as Triton's TensorRT backend serves it, run for one image and for a full batch before it is ready."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

    model = ModelConfig(name="vision_encoder", platform="tensorrt_plan", max_batch_size=_image_budget(bundle))
    model.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_GPU)
    inputs, outputs = STEPS["vision_encoder"]
    _declare(model, inputs, outputs, tensors, skip=1, name_of=str.lower)
    for batch_size in sorted({1, model.max_batch_size}):
        warm_up = model.model_warmup.add(name=f"{batch_size} images", batch_size=batch_size)
        for tensor in model.input:
            blank = warm_up.inputs[tensor.name]
            blank.data_type, blank.zero_data = tensor.data_type, True
            blank.dims.extend(tensor.dims)
    return model


def _image_budget(bundle: Bundle) -> int:
    """Most images in one run of the plan; those of a request arrive together and have to fit."""
    budget, images = bundle.manifest["recipe"]["image_budget"], bundle.profile.max_images
    if budget < images:
        raise InvalidBundle(
            f"the vision engine takes {budget} images, profile {bundle.profile.name} allows {images} in a request; "
            "build with a larger image_budget"
        )
    return budget


ENGINE_INPUTS = {
    "input_ids": ("TYPE_INT32", [-1]),
    "input_lengths": ("TYPE_INT32", None),
    "request_output_len": ("TYPE_INT32", None),
    "end_id": ("TYPE_INT32", None),
    "pad_id": ("TYPE_INT32", None),
    "stop_words_list": ("TYPE_INT32", [2, -1]),
    "temperature": ("TYPE_FP32", None),
    "runtime_top_k": ("TYPE_INT32", None),
    "runtime_top_p": ("TYPE_FP32", None),
    "repetition_penalty": ("TYPE_FP32", None),
    "seed": ("TYPE_UINT64", None),
    "streaming": ("TYPE_BOOL", None),
    "stop": ("TYPE_BOOL", None),
    "prompt_embedding_table": ("", [-1, -1]),
    "prompt_table_extra_ids": ("TYPE_UINT64", [-1]),
    "mrope_rotary_cos_sin": ("TYPE_FP32", [-1]),
    "mrope_position_deltas": ("TYPE_INT64", [1]),
}
"""What `engines.tensorrt_llm` sends of the inputs that TensorRT-LLM's backend knows; None is a scalar in its batch."""
ENGINE_OUTPUTS = {"output_ids": ("TYPE_INT32", [-1, -1]), "sequence_length": ("TYPE_INT32", [-1])}
_REQUIRED = {"input_lengths", "request_output_len"}
_RAGGED = {"input_ids", "prompt_embedding_table", "prompt_table_extra_ids"}
_TABLE_TYPES = {"bfloat16": "TYPE_BF16", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}


def _engine(bundle: Bundle, settings: Settings):
    """TensorRT-LLM's engine as its C++ backend serves it."""
    from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

    config = EngineConfig.read(bundle.path / ENGINE)
    _check_engine(bundle, settings, config)
    model = ModelConfig(name=ENGINE, backend="tensorrtllm", max_batch_size=settings.slots or config.max_batch)
    model.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)
    model.dynamic_batching.SetInParent()
    model.model_transaction_policy.decoupled = True
    for name, (kind, dims) in ENGINE_INPUTS.items():
        if name == "prompt_table_extra_ids" and not settings.prefix_reuse:
            continue
        tensor = model.input.add(name=name, dims=dims or [1], optional=name not in _REQUIRED)
        tensor.data_type = DataType.Value(kind or _TABLE_TYPES[config.dtype])
        tensor.allow_ragged_batch = name in _RAGGED
        if dims is None:
            tensor.reshape.SetInParent()
    for name, (kind, dims) in ENGINE_OUTPUTS.items():
        model.output.add(name=name, data_type=DataType.Value(kind), dims=dims)
    for key, value in _engine_parameters(bundle, settings, config).items():
        model.parameters[key].string_value = value
    return model


def _engine_parameters(bundle: Bundle, settings: Settings, config: EngineConfig) -> dict[str, str]:
    parameters = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": f"{BUNDLE}/{ENGINE}",  # from the folder in which the server was started
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "max_beam_width": "1",
        "enable_kv_cache_reuse": "true" if settings.prefix_reuse else "false",  # the backend's default is on
        "enable_chunked_context": "false",
        "exclude_input_in_output": "true",
        # The backend reads these three without a default, and does not start where one is missing.
        **dict.fromkeys(("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend"), ""),
    }
    if recipe := bundle.manifest.get("recipe"):
        tokens = int(recipe["decoder"]["kv_share"] * config.max_batch * config.max_sequence)
        parameters["max_tokens_in_paged_kv_cache"] = str(tokens)
    return parameters


def _check_engine(bundle: Bundle, settings: Settings, config: EngineConfig) -> None:
    if settings.batch_invariant:
        raise InvalidRequest("batch-invariant readings were asked for, tensorrt-llm has none; use onnxruntime")
    if settings.slots and settings.slots > config.max_batch:
        raise InvalidRequest(
            f"{settings.slots} slots were asked for, the engine was built for {config.max_batch}; ask for no more, or "
            "build with more"
        )
    geometry, profile = bundle.geometry, bundle.profile
    needs = {
        "values in an image embedding": (geometry.hidden, config.hidden, geometry.hidden == config.hidden),
        "ids in the vocabulary": (geometry.vocab, config.vocab_size, geometry.vocab == config.vocab_size),
        "tokens of context": (geometry.max_sequence, config.max_sequence, geometry.max_sequence <= config.max_sequence),
        f"image tokens of {profile.max_images} images": (
            rows := profile.max_images * geometry.token_budget,
            config.max_prompt_rows,
            rows <= config.max_prompt_rows,
        ),
    }
    for what, (wanted, has, holds) in needs.items():
        if not holds:
            raise InvalidBundle(f"the engine has {has} {what}, the bundle needs {wanted}; build the bundle again")


def _ensemble(bundle: Bundle, tensors: dict):
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    ensemble = ModelConfig(name=ENSEMBLE, platform="ensemble")
    _declare(ensemble, ("IMAGES", "REQUEST"), ("DELTA", "READING"), tensors)
    used = {"DELTA", "READING"}.union(*(inputs for inputs, _ in STEPS.values()))
    for name in MODELS:
        step = ensemble.ensemble_scheduling.step.add(model_name=name, model_version=-1)
        inputs, outputs = STEPS[name]
        own = str.lower if name == "vision_encoder" and _has_plan(bundle) else str
        step.input_map.update({own(tensor): tensor for tensor in inputs})
        # Triton refuses a tensor that no step takes.
        step.output_map.update({own(tensor): tensor for tensor in outputs if tensor in used})
    return ensemble


def _declare(model, inputs, outputs, tensors: dict, skip: int = 0, name_of=str) -> None:
    from tritonclient.grpc.model_config_pb2 import DataType

    for tensors_of_model, names in ((model.input, inputs), (model.output, outputs)):
        for name in names:
            kind, shape = tensors[name]
            tensors_of_model.add(name=name_of(name), data_type=DataType.Value(kind), dims=shape[skip:])
