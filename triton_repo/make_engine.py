"""`cxr-triton make-engine`: checkpoint → quantize → export → build → verify → package in one go, stage by stage.

Each stage leaves a folder that appears complete or not at all, and a key that says what it was made from. A run that
was killed goes on where it stopped; a stage whose key has changed is made again, with all that follow it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import click

from cxr_triton import __version__
from cxr_triton.cli import OUT_FOLDER, PROFILES, RECIPES, json_option, say_next, write_json
from cxr_triton.errors import InvalidRequest, NotVerified
from cxr_triton.extras import require
from cxr_triton.files import new_folder, write
from cxr_triton.profile import load_profile, profile_names

SCHEMA = 1
QUANTIZED = ("fp8", "int4-awq")  # precisions that need a calibrated checkpoint
PHANTOMS = 32
PHANTOM_SEED = 1_000_003  # far from the calibration's: what verifies was not calibrated on
_STATE = ".stages.json"
_LIBRARIES = (
    "onnx",
    "onnxruntime",
    "numpy",
    "ml_dtypes",
    "nvidia-modelopt",
    "torch",
    "transformers",
    "tensorrt-rtx-cu13",
)


@dataclass
class Stages:
    """Runs the stages of one folder and remembers which of them are done.

    Parameters
    ----------
    folder : Path
    say : callable
        Called with a line for each stage.
    """

    folder: Path
    say: Callable[[str], None]
    done: list[dict] = field(default_factory=list)
    _key: str = ""
    _stale: bool = False  # a stage before was made anew

    def __post_init__(self):
        try:
            state = json.loads((self.folder / _STATE).read_bytes())
        except (OSError, ValueError, RecursionError):
            state = None
        self._state: dict = state if isinstance(state, dict) and state.get("schema") == SCHEMA else {"schema": SCHEMA}

    def run(self, name: str, inputs: object, make: Callable[[Path], object], *, is_whole=Path.is_dir) -> Path:
        """The folder of a stage, made by `make` unless it is there and was made from the same.

        Parameters
        ----------
        name : str
            Of the stage and of its folder.
        inputs : object
            Plain values that, with those of the stages before, decide what comes out.
        make : callable
            Takes the folder and makes it, complete or not at all.
        is_whole : callable
            Whether a folder that is there is what `make` leaves.
        """
        path = self.folder / name
        text = json.dumps([self._key, name, inputs], sort_keys=True, default=str)
        self._key = hashlib.sha256(text.encode()).hexdigest()
        if not self._stale and self._state.get(name) == self._key and is_whole(path):
            self.done.append({"stage": name, "cached": True, "seconds": 0.0})
            self.say(f"{name}: as it was")
            return path
        if not self._stale:
            self._forget_the_rest()
        self._stale = True
        shutil.rmtree(path, ignore_errors=True)
        self.say(f"{name}: started")
        started_s = time.monotonic()
        make(path)
        seconds = round(time.monotonic() - started_s, 1)
        self._remember(name, self._key)
        self.done.append({"stage": name, "cached": False, "seconds": seconds})
        self.say(f"{name}: done in {seconds} s")
        return path

    def _forget_the_rest(self) -> None:
        """What was made behind the stages that are done belongs to another run."""
        for name in set(self._state) - {"schema", *(stage["stage"] for stage in self.done)}:
            del self._state[name]
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _remember(self, name: str, key: str) -> None:
        self._state[name] = key
        write(self.folder / _STATE, json.dumps(self._state, indent=1) + "\n")


def make_engine(
    source: str,
    out: Path,
    recipe: str,
    *,
    profile: str,
    images: Path | None = None,
    verify_images: Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    cache: Path | None = None,
    unverified: bool = False,
    accept_licence: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Make everything that a recipe asks for out of a checkpoint.

    Parameters
    ----------
    source : str
        Unquantized checkpoint folder or hub id.
    out : Path
        Gets `quantized/`, `export/`, `bundle/`, `verification.html`, `repository/`, and for engines that cannot run
        here `standin/`. May hold what an earlier run with the same arguments left.
    recipe : str
        Name or file.
    profile : str
        Name or file.
    images : Path, optional
        Radiographs to calibrate on, and to verify on where `verify_images` is None; phantoms without.
    verify_images : Path, optional
    limit : int, optional
        Most images to calibrate on and to verify on, each.
    device : {"auto", "cpu", "cuda"}
        Of calibration and of the reference.
    cache : Path, optional
        Folder of compiled plans; that of `cxr-triton build` by default.
    unverified : bool
        Package without the gate; the repository says so.
    accept_licence : bool
        The user accepts the weights' non-commercial licence.
    say : callable
        Called with a line for each stage.

    Returns
    -------
    dict
        Paths, stages with seconds and whether they were there already, digest and verdict.

    Raises
    ------
    DeviceUnavailable
        Of a tensorrt-llm recipe, before the first stage: `trtllm-build` or the recipe's GPU is not here.
    NotVerified
        The gate refused the bundle; `verification.html` says why.
    ModuleNotFoundError
        Before the first stage: a package that quantizes or verifies is not installed.
    CxrError
        What a stage raises. The stages before it stay.
    """
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.engines.plan_cache import default_folder
    from cxr_triton.engines.recipe import load_recipe
    from cxr_triton.engines.verify.record import is_verified, require_verified
    from cxr_triton.export.checkpoint import Checkpoint
    from cxr_triton.export.command import export_checkpoint, located, require_fit
    from cxr_triton.export.quantize import PACKAGES as QUANTIZING
    from cxr_triton.triton_repo.package import Settings, write_repository

    chosen, model = load_recipe(recipe), load_profile(profile)
    decoder = chosen.decoder
    if decoder.compiler == "tensorrt-llm":
        _check_tensorrt_llm(chosen, out, unverified)
    if decoder.precision in QUANTIZED:
        require(*QUANTIZING)
    elif not unverified:
        require("torch", "transformers")
    folder, _ = located(source, model)
    checkpoint = Checkpoint(folder)
    require_fit(source, checkpoint, model)
    sequence = min(chosen.max_sequence, checkpoint.text.max_position_embeddings)
    with _own(out):
        stages = Stages(out, say)
        quantized = None
        made_from = {
            "versions": {"cxr_triton": __version__, **_versions()},
            "checkpoint": _fingerprint(folder),
            "profile": model.to_yaml(),
        }
        if decoder.precision in QUANTIZED:
            from cxr_triton.export.quantize import DEFAULT_LIMIT, quantize_checkpoint

            quantized = stages.run(
                "quantized",
                [made_from, decoder.precision, decoder.kv, _fingerprint(images), limit],
                lambda path: quantize_checkpoint(
                    source,
                    path,
                    model,
                    scheme=decoder.precision,
                    images=images,
                    limit=limit or DEFAULT_LIMIT,
                    kv_fp8=decoder.kv == "fp8",
                    device=device,
                    accept_licence=accept_licence,
                ),
            )

        def exported(path: Path, **options) -> None:
            export_checkpoint(
                str(quantized or source),
                path,
                model,
                precision=decoder.precision,
                max_sequence=sequence,
                accept_licence=accept_licence,
                **options,
            )

        types = {"compute": decoder.compute, "head": decoder.head}
        if decoder.compiler == "tensorrt-llm":
            types["form"] = "tensorrt-llm"
        graphs = stages.run(
            "export", [made_from, decoder.precision, types, sequence], lambda path: exported(path, **types)
        )
        bundle = stages.run(
            "bundle",
            chosen.to_json(),
            lambda path: build_bundle(graphs, path, recipe=chosen, cache=cache or default_folder()),
        )
        standin = None
        if decoder.compiler != "onnxruntime" and not unverified and not _runs_here(bundle):
            # The same quantized weights, in the one type that a CPU multiplies.
            types = {"compute": "fp32", "head": decoder.head if decoder.head != "compute" else None}
            graphs = stages.run("standin-export", types, lambda path: exported(path, **types))
            standin = stages.run("standin", {}, lambda path: build_bundle(graphs, path))
        if not unverified:
            pictures = verify_images or images
            if pictures is None:
                pictures = stages.run(
                    "phantoms", [PHANTOMS, PHANTOM_SEED], lambda path: _draw(path, model.pixel_preset)
                )
            arguments = [_fingerprint(pictures), limit, dict(chosen.thresholds)]
            page = out / "verification.html"
            stages.run(
                "verification",
                arguments,
                lambda path: _verify(
                    path, bundle, folder, model, pictures, chosen, quantized, standin, limit, device, page
                ),
                is_whole=lambda path: path.is_dir() and is_verified(_opened(bundle)),
            )
            try:
                require_verified(_opened(bundle))
            except NotVerified as error:
                raise NotVerified(f"{error.message}; see {page}") from None
        repository = stages.run(
            "repository",
            {"unverified": unverified},
            lambda path: write_repository(bundle, path, Settings(slots=chosen.slots), unverified=unverified),
        )
    return {
        "recipe": chosen.name,
        "bundle": str(bundle),
        "repository": str(repository),
        "digest": _opened(bundle).digest,
        "verified": not unverified,
        "stages": stages.done,
    }


def _check_tensorrt_llm(recipe, out: Path, unverified: bool) -> None:
    """Refuse before the first stage what would fail after hours of quantization."""
    if recipe.decoder.precision not in QUANTIZED and not unverified:
        raise InvalidRequest(
            f"recipe {recipe.name} has {recipe.decoder.precision} weights, for which the gate has no stand-in of a "
            "tensorrt-llm engine; choose fp8 or int4-awq, or pass --unverified"
        )
    if not (out / "bundle").is_dir():
        from cxr_triton.engines.tensorrt_llm.build import check_machine

        check_machine(recipe)


def _verify(path, bundle, checkpoint, profile, pictures, recipe, quantized, standin, limit, device, page) -> None:
    """Run the gate, put the record into the bundle and the readings on a page; the folder holds the whole record."""
    from cxr_triton.engines.verify.gate import verify_bundle, write_record
    from cxr_triton.engines.verify.page import verification_page

    opened = _opened(bundle)
    files = sorted(file for file in pictures.rglob("*") if file.is_file() and not file.name.startswith("."))
    record = verify_bundle(
        opened,
        checkpoint,
        profile,
        files,
        thresholds=dict(recipe.thresholds),
        quantized=quantized,
        standin=standin,
        limit=limit,
        device=device,
    )
    write_record(opened, record)
    write(page, verification_page(record))
    with new_folder(path) as partial:
        (partial / "record.json").write_text(json.dumps(record, indent=1) + "\n")


def _draw(path: Path, preset: str) -> None:
    """Phantoms as PNG files, both photometrics in turn."""
    import numpy as np
    from PIL import Image

    from cxr_triton import phantom

    random = np.random.default_rng(PHANTOM_SEED)
    with new_folder(path) as partial:
        for i in range(PHANTOMS):
            pixels = phantom.draw(random).picture(preset, phantom.PHOTOMETRICS[i % 2])
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            (partial / f"{i:03}.png").write_bytes(file.getvalue())


def _opened(bundle: Path):
    from cxr_triton.engines.bundle import Bundle

    return Bundle.open(bundle, verify=False)


def _runs_here(bundle: Path) -> bool:
    from cxr_triton.engines.verify.gate import why_not_here

    return why_not_here(_opened(bundle)) is None


def _fingerprint(path: Path | None) -> list | None:
    """Names, sizes and times of the files of a folder: enough to see that one was exchanged, and quick for a 3B."""
    if path is None:
        return None
    files = sorted(file for file in Path(path).resolve().rglob("*") if file.is_file())
    if not files:
        raise InvalidRequest(f"{path} holds no files; give another folder")
    facts = ((file, file.stat()) for file in files)
    return [[str(file.relative_to(Path(path).resolve())), stat.st_size, stat.st_mtime_ns] for file, stat in facts]


def _versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@contextlib.contextmanager
def _own(folder: Path) -> Iterator[None]:
    """The folder for one process alone, without what a killed one left half made."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(
                f"another make-engine works in {folder}; wait for it, or choose another folder"
            ) from None
        for stale in folder.glob(".*"):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
        yield


@click.command("make-engine")
@click.argument("checkpoint")
@click.option(
    "--recipe",
    shell_complete=RECIPES,
    required=True,
    metavar="NAME|YAML",
    help="Target; `cxr-triton recipes` lists them.",
)
@click.option(
    "--profile",
    shell_complete=PROFILES,
    required=True,
    metavar="NAME|YAML",
    help=f"One of {', '.join(profile_names())}, or a file.",
)
@click.option("-o", "--out", required=True, type=OUT_FOLDER, help="Folder for all of it; made if it is not there.")
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Radiographs to calibrate and to verify on.  [default: synthetic phantoms]",
)
@click.option(
    "--verify-images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Others to verify on.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Most images to take of each.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), help="Folder of compiled plans.")
@click.option("--unverified", is_flag=True, help="Package without the gate; the repository says so.")
@click.option("--accept-licence", is_flag=True, help="You accept the weights' non-commercial licence.")
@click.option("--print", "only_print", is_flag=True, help="Of a tensorrt-llm recipe: show `docker run`, do nothing.")
@json_option
def command(checkpoint: str, json_path: str | None, only_print: bool, **options):
    """Make a served engine of CHECKPOINT, a folder or a hub id ORG/NAME, for the target of a recipe.

    Quantizes, exports, builds, verifies and packages. A run that was stopped goes on where it was; a second run does
    only what has changed. A tensorrt-llm recipe runs in its container, on its GPU.
    """
    if only_print:
        line = _in_container(checkpoint, **options)
        click.echo(line, err=json_path == "-")
        write_json({"docker": line}, json_path)
        return
    started_s = time.monotonic()
    result = make_engine(checkpoint, options.pop("out"), **options, say=lambda line: click.echo(line, err=True))
    result["seconds"] = round(time.monotonic() - started_s, 1)
    click.echo(f"{result['repository']}: {result['recipe']}, digest {result['digest'][:12]}", err=json_path == "-")
    write_json(result, json_path)
    say_next("serve", result["repository"])


def _in_container(checkpoint: str, *, recipe: str, profile: str, out: Path, cache: Path | None, **options) -> str:
    """`docker run` of this verb for a tensorrt-llm recipe; the cache of plans and the hub's lie in `out`."""
    from cxr_triton.engines.container import in_container, located_recipe
    from cxr_triton.engines.recipe import load_recipe

    chosen = load_recipe(recipe)
    if chosen.decoder.compiler != "tensorrt-llm":
        raise click.UsageError("--print is for recipes whose decoder is for tensorrt-llm, see `cxr-triton recipes`")
    out = out.resolve()
    source = Path(checkpoint).resolve() if Path(checkpoint).is_dir() else checkpoint
    model = profile if profile in profile_names() else Path(profile).resolve()
    arguments = ["make-engine", source, "--recipe", located_recipe(recipe), "--profile", model, "-o", out]
    arguments += ["--cache", cache.resolve() if cache else out / "plans"]
    for name, value in options.items():
        if value is not None and value is not False and (name, value) != ("device", "auto"):
            given = value.resolve() if isinstance(value, Path) else value
            arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [given])]
    read = [
        argument for argument in arguments if isinstance(argument, Path) and out not in (argument, *argument.parents)
    ]
    return in_container(chosen, arguments, read=read, write=out, env={"HF_HOME": out / "hub"})
