"""How a bundle with TensorRT-LLM's engine is served, in NVIDIA's backends of Triton.

The model `tensorrt_llm` runs the engine, which `decoder` calls, and `vision_encoder` is a TensorRT plan. Such a server
has to be started in the repository's folder.
"""

from __future__ import annotations

from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.interface import Serving
from cxr_triton.engines.serving import BUNDLE, STEPS, Settings, declare, tensors
from cxr_triton.engines.tensorrt import TensorRT
from cxr_triton.engines.tensorrt_llm.layout import FOLDER
from cxr_triton.engines.tensorrt_llm.request import EngineConfig
from cxr_triton.errors import InvalidBundle, InvalidRequest


def serving(bundle: Bundle, settings: Settings) -> Serving:
    """See `Engine.serving`.

    Raises
    ------
    InvalidRequest
        More slots than the engine has.
    InvalidBundle
        An engine is too small for the bundle's profile.
    """
    config = EngineConfig.read(bundle.path / FOLDER)
    _check_engine(bundle, settings, config)
    engine = _engine(bundle, settings, config)
    parameters = {"slots": engine.max_batch_size, "prefix_reuse": int(bool(settings.prefix_reuse))}
    if bundle.vision_engine != TensorRT.name:
        return Serving(parameters=parameters, models=(engine,))
    embeddings = f"TYPE_{bundle.geometry.compute.upper()}"
    return Serving(
        parameters=parameters,
        models=(engine,),
        vision=_vision_plan(bundle, embeddings),
        embeddings=embeddings,
        files={"vision_encoder/1/model.plan": "vision.plan"},
    )


def _vision_plan(bundle: Bundle, embeddings: str):
    """The plan as Triton's TensorRT backend serves it, run for one image and for a full batch before it is ready."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

    model = ModelConfig(name="vision_encoder", platform="tensorrt_plan", max_batch_size=_image_budget(bundle))
    model.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_GPU)
    inputs, outputs = STEPS["vision_encoder"]
    declare(model, inputs, outputs, tensors(bundle.geometry, embeddings), skip=1, name_of=str.lower)
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


INPUTS = {
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
"""What `request` sends of the inputs that the backend knows; None is a scalar in its batch."""
OUTPUTS = {"output_ids": ("TYPE_INT32", [-1, -1]), "sequence_length": ("TYPE_INT32", [-1])}
_REQUIRED = {"input_lengths", "request_output_len"}
_RAGGED = {"input_ids", "prompt_embedding_table", "prompt_table_extra_ids"}
_TABLE_TYPES = {"bfloat16": "TYPE_BF16", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}


def _engine(bundle: Bundle, settings: Settings, config: EngineConfig):
    """TensorRT-LLM's engine as its C++ backend serves it."""
    from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

    model = ModelConfig(name=FOLDER, backend="tensorrtllm", max_batch_size=settings.slots or config.max_batch)
    model.instance_group.add(count=1, kind=ModelInstanceGroup.KIND_CPU)
    model.dynamic_batching.SetInParent()
    model.model_transaction_policy.decoupled = True
    for name, (kind, dims) in INPUTS.items():
        if name == "prompt_table_extra_ids" and not settings.prefix_reuse:
            continue
        tensor = model.input.add(name=name, dims=dims or [1], optional=name not in _REQUIRED)
        tensor.data_type = DataType.Value(kind or _TABLE_TYPES[config.dtype])
        tensor.allow_ragged_batch = name in _RAGGED
        if dims is None:
            tensor.reshape.SetInParent()
    for name, (kind, dims) in OUTPUTS.items():
        model.output.add(name=name, data_type=DataType.Value(kind), dims=dims)
    for key, value in _engine_parameters(bundle, settings, config).items():
        model.parameters[key].string_value = value
    return model


def _engine_parameters(bundle: Bundle, settings: Settings, config: EngineConfig) -> dict[str, str]:
    parameters = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": f"{BUNDLE}/{FOLDER}",  # from the folder in which the server was started
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
