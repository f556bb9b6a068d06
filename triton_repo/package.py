"""A deployable Triton model repository from an engine bundle.

`config.pbtxt` is made from Triton's own protobuf messages, so it is valid by construction. The bundle lies in
``decoder/1/bundle``, where Triton takes it for no model; all models find it by a path relative to the repository, which
can therefore be moved.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cxr_triton.engines import ABILITIES, engine, require_ability
from cxr_triton.engines.bundle import MANIFEST, Bundle
from cxr_triton.engines.interface import Serving
from cxr_triton.engines.serving import BUNDLE, ENSEMBLE, STEPS, Settings, declare, tensors
from cxr_triton.engines.verify.record import require_accurate, require_verified
from cxr_triton.errors import InvalidRequest, NotVerified, unknown_key
from cxr_triton.files import new_folder, require_new
from cxr_triton.triton_repo.integrity import seal
from cxr_triton.triton_repo.occupied import occupy

VERIFICATION = "VERIFICATION"
VISION_BATCH = 8  # images
_ADAPTERS = Path(__file__).parent
_LINKED_BYTES = 64 << 20
_FICLONE = 0x40049409


def write_repository(
    bundle: str | Path, out: str | Path, settings: Settings, *, force: bool = False, unverified: bool = False
) -> Bundle:
    """Write a model repository; it appears complete or not at all.

    Parameters
    ----------
    bundle : path
        What ``cxr-triton build`` wrote. Its files are copied; those of 64 MiB and more share their blocks with the
        bundle's, where the file system can do that, else they are hard-linked, where it can do that.
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
        It has no passing record of the verification gate, or was not right enough on labelled data, and `unverified`
        is false.
    """
    from google.protobuf import text_format

    source, out = Bundle.open(bundle, verify=False), Path(out).resolve()
    verification = _verification(source, unverified)
    if not force:
        require_new(out, "choose another one or replace a repository with --force")
    used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if used and not (out / ENSEMBLE / "config.pbtxt").is_file():
        raise InvalidRequest(f"{out} holds no model repository, so --force does not replace it; remove it yourself")
    serving = serving_of(source, settings)
    with _kept(out if used else None), new_folder(out, replaces=used) as new:
        for model in models(source, settings, serving, verification[0]):
            (new / model.name / "1").mkdir(parents=True)
            (new / model.name / "config.pbtxt").write_text(text_format.MessageToString(model))
            if model.backend == "python":
                shutil.copyfile(_ADAPTERS / model.name / "1" / "model.py", new / model.name / "1" / "model.py")
            elif not any(path.startswith(f"{model.name}/") for path in serving.files):
                # Triton wants a version folder all the same, and an empty one gets lost in copies
                (new / model.name / "1" / "README").write_text("No file of its own; see config.pbtxt.\n")
        for path, file in serving.files.items():
            take(source.path / file, new / path)
        (new / ENSEMBLE / "1" / VERIFICATION).write_text("\n".join(verification) + "\n")
        (new / BUNDLE).mkdir()
        for file in (MANIFEST, *source.manifest["files"]):
            take(source.path / file, new / BUNDLE / file)
        Bundle.open(new / BUNDLE)
        seal(new)
    return Bundle.open(out / BUNDLE, verify=False)


@contextlib.contextmanager
def _kept(repository: Path | None) -> Iterator[None]:
    """Nobody tunes a repository while it is replaced; raises `Unavailable` where somebody does."""
    lock = occupy(repository) if repository else None
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _verification(bundle: Bundle, unverified: bool) -> tuple[str, str]:
    """``passed`` or ``unverified``, and in words what that rests on."""
    try:
        record, accuracy = require_verified(bundle), require_accurate(bundle)
    except NotVerified as error:
        if not unverified:
            raise
        return "unverified", f"Packaged with --unverified: {error.message.partition(';')[0]}."
    runtime = record["runtime"].get("said") or f"run in {record['runtime'].get('engine')}"
    said = f"The verification gate passed on {record['made']}, {record['images']['count']} images, {runtime}."
    if accuracy:
        said += f" Accuracy on {accuracy['data']['studies']} studies of {accuracy['data']['name']} passed too."
    return "passed", said


def take(source: Path, target: Path) -> None:
    """A copy of a file that takes no room where it is large; one that people edit is never the same file in both."""
    target.parent.mkdir(exist_ok=True)
    source = source.resolve()
    if source.stat().st_size >= _LINKED_BYTES:
        try:
            with open(source, "rb") as there, open(target, "xb") as here:
                fcntl.ioctl(here, _FICLONE, there.fileno())
            return
        except OSError:
            target.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def serving_of(bundle: Bundle, settings: Settings) -> Serving:
    """How the decoder's engine is served; raises `InvalidRequest` where it does not do what is asked of it."""
    for ability in ABILITIES:
        if getattr(settings, ability):
            require_ability(bundle.engine, ability)
    known = engine(bundle.engine).options()
    for name in settings.options:
        if name not in known:
            raise InvalidRequest(
                unknown_key(name, known, f"options of {bundle.engine}").replace("key", "option", 1)
                if known
                else f"option {name} was asked for, {bundle.engine} has none"
            )
    return engine(bundle.engine).serving(bundle, settings)


def models(bundle: Bundle, settings: Settings, serving: Serving, verification: str) -> list:
    """``ModelConfig`` of each model and, last, the ensemble; each says how the bundle was verified."""
    known, queue_size = tensors(bundle.geometry, serving.embeddings), settings.queue_size
    preprocess = _python("dicom_preprocess", known, {"bundle": BUNDLE}, instances=settings.preprocess_instances)
    vision = serving.vision
    if vision is None:
        threads = settings.threads if settings.vision_threads is None else settings.vision_threads
        kept = {"threads": threads, "picture_cache_mib": settings.picture_cache_mib}
        vision = _python("vision_encoder", known, {"bundle": BUNDLE, **kept})
        vision.max_batch_size = _vision_batch(bundle, settings.vision_batch)
    decoder = _python("decoder", known, {"bundle": BUNDLE, "queue_size": queue_size, **serving.parameters})
    report = _python("report", known, {})  # one instance: chunks have to stay in order
    for model in (preprocess, vision):
        model.dynamic_batching.default_queue_policy.max_queue_size = queue_size
    for tensor in decoder.input:  # STOP comes alone
        tensor.optional = True
    decoder.model_transaction_policy.decoupled = True
    steps = [preprocess, vision, decoder, report]
    ensemble = _ensemble(steps, known)
    ensemble.parameters["profile"].string_value = bundle.profile.to_json()  # so that a client knows tasks and modes
    result = [*steps, *serving.models, ensemble]
    for model in result:
        model.parameters["verification"].string_value = verification
    return result


def _vision_batch(bundle: Bundle, asked: int | None) -> int:
    """Images in one run of the tower: those of a request arrive together and have to fit."""
    least = max(1, bundle.profile.max_images)
    if asked is not None and asked < least:
        raise InvalidRequest(
            f"vision_batch is {asked}, a request of profile {bundle.profile.name} may have {least} images, which are "
            f"one batch; ask for {least} or more"
        )
    return asked or max(least, VISION_BATCH)


def _python(name: str, known: dict, parameters: dict[str, object], *, instances: int = 1):
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
    declare(model, inputs, outputs, known, skip=1 if batched else 0)
    return model


def _ensemble(models: list, known: dict):
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    ensemble = ModelConfig(name=ENSEMBLE, platform="ensemble")
    declare(ensemble, ("IMAGES", "REQUEST"), ("DELTA", "READING"), known)
    used = {"DELTA", "READING"}.union(*(inputs for inputs, _ in STEPS.values()))
    for model in models:
        step = ensemble.ensemble_scheduling.step.add(model_name=model.name, model_version=-1)
        inputs, outputs = STEPS[model.name]
        # A model may have names of its own; what it takes besides, STOP, comes last.
        step.input_map.update({tensor.name: name for tensor, name in zip(model.input, inputs, strict=False)})
        # Triton refuses a tensor that no step takes.
        named = zip(model.output, outputs, strict=True)
        step.output_map.update({tensor.name: name for tensor, name in named if name in used})
    return ensemble
