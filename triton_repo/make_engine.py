"""Checkpoint → quantize → export → build → verify → package in one go, stage by stage."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cxr_triton import __version__
from cxr_triton.engines import ROOMS, engine, without_adapter
from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.container import in_container as docker_run
from cxr_triton.engines.container import located_recipe
from cxr_triton.engines.plan_cache import default_folder
from cxr_triton.engines.recipe import Recipe, load_recipe
from cxr_triton.engines.verify.record import is_verified, require_accurate, require_verified, subject, write_record
from cxr_triton.errors import InvalidRequest, NotVerified
from cxr_triton.export.adapter import Adapter, named_adapter
from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.export import export_checkpoint
from cxr_triton.export.graph import QUANTIZED
from cxr_triton.export.source import located, require_fit
from cxr_triton.extras import require
from cxr_triton.files import new_folder, write
from cxr_triton.identity import sha256
from cxr_triton.profile import ModelProfile, load_profile, profile_names
from cxr_triton.triton_repo.package import BUNDLE, Settings, write_repository
from cxr_triton.triton_repo.stages import Stages, fingerprint, opened

LIBRARIES = ("onnx", "numpy", "ml_dtypes", "nvidia-modelopt", "torch", "transformers")
"""Distributions that, with those of the engines, a stage is made with."""
SOURCE = "source.json"
"""In the folder of a run: the commit of its checkpoint, which the next run takes too."""
PHANTOMS = 32
PHANTOM_SEED = 1_000_003  # far from the calibration's: what verifies was not calibrated on


Judge = Callable[[Path, Path, dict[str, float]], dict]
"""Repository to serve, result to write and limits to the record of its accuracy; `Evaluation`."""


@dataclass(frozen=True)
class Evaluation:
    """A stage that measures the engine on labelled data.

    Attributes
    ----------
    data : Path
        DATA.yaml of `cxr-triton evaluate`.
    against : Path or None
        Result on the same data that the engine must not be worse than.
    judge : callable
        Evaluates, and says whether it passed.
    """

    data: Path
    against: Path | None
    judge: Judge


def make_engine(
    source: str,
    out: Path,
    recipe: str,
    *,
    profile: str,
    revision: str | None = None,
    images: Path | None = None,
    verify_images: Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    cache: Path | None = None,
    unverified: bool = False,
    accept_licence: bool = False,
    adapter: Path | None = None,
    evaluation: Evaluation | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Make everything that a recipe asks for out of a checkpoint.

    Parameters
    ----------
    source : str
        Unquantized checkpoint folder or hub id.
    out : Path
        Gets `quantized/`, `export/`, `bundle/`, `verification.html`, `evaluation/`, `repository/`, and for engines that
        cannot run here `standin/`. May hold what an earlier run with the same arguments left.
    recipe, profile : str
        Names or files.
    revision : str, optional
        Of a hub id. By default the profile's, or what an earlier run into `out` took; else the hub's newest, once.
    images, verify_images : Path, optional
        Radiographs to calibrate on, and to verify on if they are others; phantoms without.
    limit : int, optional
        Most images to calibrate on and to verify on, each.
    device : {"auto", "cpu", "cuda"}
        Of calibration and of the reference.
    cache : Path, optional
        Folder of compiled plans; that of `cxr-triton build` by default.
    unverified, accept_licence : bool
        Package without the gate, which the repository says; the weights' non-commercial licence is accepted.
    adapter : Path, optional
        Folder of the LoRA adapter that the profile names.
    evaluation : Evaluation, optional
        On labelled data, before it is packaged.
    say : callable
        Called with a line for each stage.

    Returns
    -------
    dict
        Paths, stages with seconds and whether they were there already, digest and verdict.

    Raises
    ------
    DeviceUnavailable, ModuleNotFoundError
        Before the first stage: the machine cannot build for the recipe, or a package is not installed.
    NotVerified
        The gate refused the bundle, `verification.html` says why; or it is not right enough on labelled data.
    CxrError
        What a stage raises. The stages before it stay.
    """
    chosen, model = load_recipe(recipe), load_profile(profile)
    _check(chosen, out, unverified, evaluation)
    if model.adapter and (fault := without_adapter(chosen.decoder.compiler, model.adapter.name)):
        raise InvalidRequest(fault)
    folder, commit = located(source, model, revision or _pinned(out, source))
    checkpoint = Checkpoint(folder)
    require_fit(source, checkpoint, model)
    lora = named_adapter(adapter, checkpoint, model)
    with opened(out, _made_from(folder, commit, model, lora), say) as stages:
        if commit:
            _pin(out, source, commit, say)
        return _Run(
            stages=stages, source=source, revision=commit, checkpoint=checkpoint, recipe=chosen, profile=model,
            images=images, verify_images=verify_images, limit=limit, device=device, cache=cache or default_folder(),
            accept_licence=accept_licence, adapter=adapter, evaluation=evaluation,
        ).make(unverified)  # fmt: skip


def _made_from(checkpoint: Path, commit: str | None, profile: ModelProfile, adapter: Adapter | None) -> dict:
    """What every stage rests on."""
    facts = {"versions": _versions(), "revision": commit, "checkpoint": fingerprint(checkpoint)}
    return facts | {"profile": profile.to_yaml()} | ({"adapter": adapter.files} if adapter else {})


def _pin(out: Path, source: str, commit: str, say: Callable[[str], None]) -> None:
    """Keep the commit of a hub id for the next run."""
    say(f"{source}: commit {commit}")
    write(out / SOURCE, json.dumps({"name": source, "revision": commit}, indent=1) + "\n")


def _pinned(out: Path, source: str) -> str | None:
    """The commit of a hub id that an earlier run into the folder took."""
    try:
        told = json.loads((out / SOURCE).read_bytes())
        is_same = told["name"].casefold() == source.casefold() and not Path(source).is_dir()
        return str(told["revision"]) if is_same else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def _check(recipe: Recipe, out: Path, unverified: bool, evaluation: Evaluation | None) -> None:
    """Refuse before the first stage what would fail after hours of quantization."""
    if evaluation and not (recipe.accuracy or evaluation.against):
        raise InvalidRequest(
            f"recipe {recipe.name} has no limit of accuracy and there is no result to hold the engine against; "
            "give the recipe an accuracy, or --against RESULT"
        )
    precision, builder = recipe.decoder.precision, engine(recipe.decoder.compiler)
    if builder.in_container and precision not in QUANTIZED and not unverified:
        raise InvalidRequest(
            f"recipe {recipe.name} has {precision} weights, for which the gate has no stand-in of a {builder.name} "
            f"engine; choose {' or '.join(QUANTIZED)}, or pass --unverified"
        )
    if not (out / "bundle").is_dir():
        builder.check_machine(recipe)
    if precision in QUANTIZED:
        from cxr_triton.export.quantize import PACKAGES

        require(*PACKAGES)
    elif not unverified:
        require("torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the stages of one run are made from."""

    stages: Stages
    source: str
    revision: str | None
    checkpoint: Checkpoint
    recipe: Recipe
    profile: ModelProfile
    images: Path | None
    verify_images: Path | None
    limit: int | None
    device: str
    cache: Path
    accept_licence: bool
    adapter: Path | None
    evaluation: Evaluation | None

    def make(self, unverified: bool) -> dict:
        decoder, settings = self.recipe.decoder, Settings(slots=self.recipe.slots)
        weights = self.quantize() if decoder.precision in QUANTIZED else None
        graphs = self.export("export", weights, decoder.compute, decoder.head, engine(decoder.compiler).form)
        bundle = self.stages.run(
            "bundle",
            self.recipe.to_json(),
            lambda path: build_bundle(graphs, path, recipe=self.recipe, cache=self.cache),
        )
        standin = self.standin(bundle, weights) if self.evaluation or not unverified else None
        if not unverified:
            self.verify(bundle, weights, standin)
        if self.evaluation:
            self.evaluate(self.evaluation, bundle, standin, settings)
        repository = self.stages.run(
            "repository",
            {"unverified": unverified},
            lambda path: write_repository(bundle, path, settings, unverified=unverified),
        )
        return {
            "recipe": self.recipe.name,
            "bundle": str(bundle),
            "repository": str(repository),
            "digest": _bundle(bundle).digest,
            "verified": not unverified,
            "accuracy": _bundle(bundle).manifest.get("accuracy"),
            "stages": self.stages.done,
        }

    def quantize(self) -> Path:
        from cxr_triton.export.quantize import DEFAULT_LIMIT, quantize_checkpoint

        decoder = self.recipe.decoder
        return self.stages.run(
            "quantized",
            [decoder.precision, decoder.kv, fingerprint(self.images) if self.images else None, self.limit],
            lambda path: quantize_checkpoint(
                self.source,
                path,
                self.profile,
                revision=self.revision,
                scheme=decoder.precision,
                images=self.images,
                limit=self.limit or DEFAULT_LIMIT,
                kv_fp8=decoder.kv == "fp8",
                device=self.device,
                accept_licence=self.accept_licence,
            ),
        )

    def export(self, stage: str, weights: Path | None, compute: str, head: str | None, form: str = "onnx") -> Path:
        precision = self.recipe.decoder.precision
        sequence = min(self.recipe.max_sequence, self.checkpoint.text.max_position_embeddings)
        return self.stages.run(
            stage,
            [precision, compute, head, form, sequence],
            lambda path: export_checkpoint(
                str(weights or self.source),
                path,
                self.profile,
                revision=self.revision,
                precision=precision,
                compute=compute,
                head=head,
                form=form,
                max_sequence=sequence,
                adapter=self.adapter,
                accept_licence=self.accept_licence,
            ),
        )

    def verify(self, bundle: Path, weights: Path | None, standin: Path | None) -> None:
        page = self.stages.folder / "verification.html"
        pictures = self.verify_images or self.images
        if pictures is None:
            pictures = self.stages.run(
                "phantoms", [PHANTOMS, PHANTOM_SEED], lambda path: _draw(path, self.profile.pixel_preset)
            )
        self.stages.run(
            "verification",
            [fingerprint(pictures), self.limit, dict(self.recipe.thresholds)],
            lambda path: self.judge(path, page, _bundle(bundle), pictures, quantized=weights, standin=standin),
            is_whole=lambda path: path.is_dir() and is_verified(_bundle(bundle)),
        )
        try:
            require_verified(_bundle(bundle))
        except NotVerified as error:
            raise NotVerified(f"{error.message}; see {page}") from None

    def evaluate(self, evaluation: Evaluation, bundle: Path, standin: Path | None, settings: Settings) -> None:
        """Serve the engine, or what stands in for it, and hold its accuracy against the recipe's limits."""
        against = evaluation.against
        trial = self.stages.run(
            "trial", {}, lambda path: write_repository(standin or bundle, path, settings, unverified=True)
        )

        def judged(path: Path) -> None:
            tried = _bundle(trial / BUNDLE)
            # Of this engine only: an evaluation goes on with what another left.
            result = self.stages.folder / "evaluation" / f"{tried.digest[:16]}.jsonl"
            result.parent.mkdir(exist_ok=True)
            record = evaluation.judge(trial, result, dict(self.recipe.accuracy))
            record |= {"subject": subject(_bundle(bundle).manifest), "engine": tried.engine, "bundle": tried.digest}
            write_record(bundle, record, "accuracy")
            with new_folder(path) as partial:
                (partial / "record.json").write_text(json.dumps(record, indent=1) + "\n")

        self.stages.run(
            "accuracy",
            [evaluation.data.read_text(), against and sha256(against.read_bytes()), dict(self.recipe.accuracy)],
            judged,
            is_whole=lambda path: path.is_dir() and "accuracy" in _bundle(bundle).manifest,
        )
        require_accurate(_bundle(bundle))

    def standin(self, bundle: Path, weights: Path | None) -> Path | None:
        """Of engines that cannot run here, the same quantized weights in the one type that a CPU multiplies."""
        from cxr_triton.engines.verify.engine_under_test import why_not_here

        if why_not_here(_bundle(bundle)) is None:
            return None
        if self.profile.adapter:
            raise InvalidRequest(
                f"{self.recipe.decoder.compiler} cannot be run here, and nothing stands in for it with a LoRA adapter; "
                "make it on a machine that runs it, or pass --unverified"
            )
        head = self.recipe.decoder.head
        graphs = self.export("standin-export", weights, "fp32", head if head != "compute" else None)
        return self.stages.run("standin", {}, lambda path: build_bundle(graphs, path))

    def judge(
        self, path: Path, page: Path, bundle: Bundle, pictures: Path, *, quantized: Path | None, standin: Path | None
    ) -> None:
        """Run the gate: its record goes into the bundle, its readings on a page, all of it into the folder `path`."""
        from cxr_triton.engines.verify.gate import verify_bundle
        from cxr_triton.engines.verify.page import verification_page

        record = verify_bundle(
            bundle,
            self.checkpoint.folder,
            self.profile,
            sorted(file for file in pictures.rglob("*") if file.is_file() and not file.name.startswith(".")),
            thresholds=dict(self.recipe.thresholds),
            limit=self.limit,
            device=self.device,
            quantized=quantized,
            standin=standin,
        )
        write_record(bundle, record)
        write(page, verification_page(record))
        with new_folder(path) as partial:
            (partial / "record.json").write_text(json.dumps(record, indent=1) + "\n")


def _draw(path: Path, preset: str) -> None:
    """Phantoms as PNG files."""
    from cxr_triton.phantom import png_files

    with new_folder(path) as partial:
        for i, file in enumerate(png_files(PHANTOMS, PHANTOM_SEED, preset)):
            (partial / f"{i:03}.png").write_bytes(file)


def _bundle(path: Path) -> Bundle:
    return Bundle.open(path, verify=False)


def _versions() -> dict[str, str]:
    versions = {"cxr_triton": __version__}
    for name in (*LIBRARIES, *(name for room in ROOMS for name in engine(room).distributions)):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def in_container(checkpoint: str, *, recipe: str, profile: str, out: Path, cache: Path | None, **options) -> str:
    """`docker run` of `make_engine` in a recipe's container; the cache of plans and the hub's lie in `out`.

    Parameters
    ----------
    checkpoint, recipe, profile, out, cache
        As `make_engine` takes them.
    options
        Its others, by name; those that are None or false are left out.
    """
    out = out.resolve()
    source = Path(checkpoint).resolve() if Path(checkpoint).is_dir() else checkpoint
    model = profile if profile in profile_names() else Path(profile).resolve()
    arguments = ["make-engine", source, "--recipe", located_recipe(recipe), "--profile", model, "-o", out]
    arguments += ["--cache", cache.resolve() if cache else out / "plans"]
    for name, value in options.items():
        if value is not None and value is not False and (name, value) != ("device", "auto"):
            given = value.resolve() if isinstance(value, Path) else value
            arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [given])]
    read = [path for path in arguments if isinstance(path, Path) and out not in (path, *path.parents)]
    return docker_run(load_recipe(recipe), arguments, read=read, write=out, env={"HF_HOME": out / "hub"})
