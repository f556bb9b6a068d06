"""A deployable Triton model repository from an engine bundle.

`config.pbtxt` is made from Triton's own protobuf messages, so it is valid by construction. The bundle lies in
``decoder/1/bundle``, where Triton takes it for no model; all models find it by a path relative to the repository, which
can therefore be moved.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cxr_triton.engines.bundle import MANIFEST, Bundle, Geometry
from cxr_triton.engines.record import require_verified
from cxr_triton.errors import InvalidRequest, NotVerified

BUNDLE = "decoder/1/bundle"
ENSEMBLE = "cxr_reader"
VERIFICATION = "VERIFICATION"
VISION_BATCH = 8  # images
MODELS = ("dicom_preprocess", "vision_encoder", "decoder", "report")
_ADAPTERS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a repository is served.

    Parameters
    ----------
    slots : int
        Streams that decode at the same time; each takes a KV cache of the bundle's whole context.
    preprocess_instances : int
        Processes that decode images, each with a sandboxed child.
    threads : int
        CPU threads of each of the two graphs; 0 takes all cores.
    queue_size : int
        Requests that may wait before each of preprocessing, vision encoder and decoder; one more is QUEUE_FULL.
    batch_invariant : bool
        A reading never depends on what else runs, to the last bit; see `engines.session.DecoderSession`.
    """

    slots: int = 4
    preprocess_instances: int = 2
    threads: int = 0
    queue_size: int = 64
    batch_invariant: bool = False

    def __post_init__(self):
        for name, least in (("slots", 1), ("preprocess_instances", 1), ("threads", 0), ("queue_size", 1)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"{name} is {getattr(self, name)}, must be at least {least}")


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
        `out` is in use.
    InvalidBundle
        The bundle is damaged.
    NotVerified
        It has no passing record of the verification gate, and `unverified` is false.
    """
    source, out = Bundle.open(bundle, verify=False), Path(out).resolve()
    verification = _verification(source, unverified)
    used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if used and not force:
        raise InvalidRequest(f"{out} is not an empty folder; choose another one or replace a repository with --force")
    if used and not (out / ENSEMBLE / "config.pbtxt").is_file():
        raise InvalidRequest(f"{out} holds no model repository, so --force does not replace it; remove it yourself")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        new = partial / "new"
        for name, text in configs(source, settings, verification[0]).items():
            (new / name / "1").mkdir(parents=True)
            (new / name / "config.pbtxt").write_text(text)
        for name in MODELS:
            shutil.copyfile(_ADAPTERS / name / "1" / "model.py", new / name / "1" / "model.py")
        # Triton wants a version folder of an ensemble too, and an empty one gets lost in copies and version control.
        (new / ENSEMBLE / "1" / "README").write_text("The ensemble has no file of its own; see config.pbtxt.\n")
        (new / ENSEMBLE / "1" / VERIFICATION).write_text("\n".join(verification) + "\n")
        (new / BUNDLE).mkdir()
        for file in (MANIFEST, *source.manifest["files"]):
            _link(source.path / file, new / BUNDLE / file)
        Bundle.open(new / BUNDLE)
        if used:
            os.replace(out, partial / "old")
        os.replace(new, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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


def configs(bundle: Bundle, settings: Settings, verification: str) -> dict[str, str]:
    """Text of ``config.pbtxt`` for each model and the ensemble; each says how the bundle was verified."""
    from google.protobuf import text_format

    tensors, threads, queue_size = _tensors(bundle.geometry), settings.threads, settings.queue_size
    preprocess = _python("dicom_preprocess", tensors, instances=settings.preprocess_instances, bundle=BUNDLE)
    vision = _python("vision_encoder", tensors, bundle=BUNDLE, threads=threads)
    decoder = _python(
        "decoder",
        tensors,
        bundle=BUNDLE,
        slots=settings.slots,
        threads=threads,
        queue_size=queue_size,
        batch_invariant=int(settings.batch_invariant),
    )
    report = _python("report", tensors)  # one instance: chunks have to stay in order
    for model in (preprocess, vision):
        model.dynamic_batching.default_queue_policy.max_queue_size = queue_size
    # A request's images arrive together and have to fit into one batch.
    vision.max_batch_size = max(bundle.profile.max_images, VISION_BATCH)
    for tensor in decoder.input:  # STOP comes alone
        tensor.optional = True
    decoder.model_transaction_policy.decoupled = True
    models = (preprocess, vision, decoder, report, _ensemble(tensors))
    for model in models:
        model.parameters["verification"].string_value = verification
    return {model.name: text_format.MessageToString(model) for model in models}


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


def _tensors(geometry: Geometry) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor between the steps; images are the batch of `vision_encoder`."""
    windows, tokens = geometry.window_budget, geometry.token_budget
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
        "IMAGE_EMBEDDINGS": ("TYPE_FP32", [-1, tokens, geometry.hidden]),
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


def _ensemble(tensors: dict):
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    ensemble = ModelConfig(name=ENSEMBLE, platform="ensemble")
    _declare(ensemble, ("IMAGES", "REQUEST"), ("DELTA", "READING"), tensors)
    used = {"DELTA", "READING"}.union(*(inputs for inputs, _ in STEPS.values()))
    for name in MODELS:
        step = ensemble.ensemble_scheduling.step.add(model_name=name, model_version=-1)
        inputs, outputs = STEPS[name]
        step.input_map.update({tensor: tensor for tensor in inputs})
        # Triton refuses a tensor that no step takes.
        step.output_map.update({tensor: tensor for tensor in outputs if tensor in used})
    return ensemble


def _declare(model, inputs, outputs, tensors: dict, skip: int = 0) -> None:
    from tritonclient.grpc.model_config_pb2 import DataType

    for tensors_of_model, names in ((model.input, inputs), (model.output, outputs)):
        for name in names:
            kind, shape = tensors[name]
            tensors_of_model.add(name=name, data_type=DataType.Value(kind), dims=shape[skip:])
