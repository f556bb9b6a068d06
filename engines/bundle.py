"""Engine bundle: a folder of graphs, weights, tokenizer and profile, and the manifest that vouches for each file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from cxr_triton import __version__
from cxr_triton.engines.onnxruntime.compiler import compile_decoder
from cxr_triton.engines.plan_cache import PlanCache, plan_key
from cxr_triton.engines.recipe import CPU_ENGINES, DECODER_ENGINES, ENGINES, GRAPH_ENGINES, Recipe
from cxr_triton.errors import InvalidBundle, InvalidRequest
from cxr_triton.files import new_folder, require_new
from cxr_triton.profile import ModelProfile, load_profile

SCHEMA = 1
MANIFEST = "manifest.json"
EXPORT = "export.json"
SIDE_FILES = (
    "profile.yaml",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
GRAPHS = ("vision", "decoder")
TENSORRT_LLM, TENSORRT_LLM_FILES = "tensorrt_llm", ("config.json", "rank0.engine")
"""Folder of a bundle with what `trtllm-build` wrote, and nothing else."""
_TENSORRT_LLM_PATHS = tuple(f"{TENSORRT_LLM}/{name}" for name in TENSORRT_LLM_FILES)
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_READ_BYTES = 1 << 22

Progress = Callable[[str, int], None]
"""Called with a file's name and the bytes just hashed or copied."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes and ids that a runtime needs before it opens a graph.

    Attributes
    ----------
    hidden, layers, kv_heads, head_dim, vocab : int
        Of the decoder.
    window_budget, token_budget : int
        W and T of the vision graph: windows and merged tokens of one image.
    max_sequence : int
        Prompt and answer of one request, in tokens.
    compute : str
        Type of the graphs' float inputs and outputs: ``fp32``, ``fp16`` or ``bf16``.
    image_token_id, vision_start_token_id : int
    eos_token_ids : tuple of int
    merge_size : int
        Patches per side of a merge unit.
    """

    hidden: int
    layers: int
    kv_heads: int
    head_dim: int
    vocab: int
    window_budget: int
    token_budget: int
    max_sequence: int
    compute: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    vision_start_token_id: int
    merge_size: int

    @classmethod
    def from_json(cls, values: dict, where: str) -> Geometry:
        """Check names and types; raises `InvalidBundle`."""
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != set(fields):
            got = set(values) if isinstance(values, dict) else set()
            raise InvalidBundle(
                f"{where}: geometry lacks {sorted(set(fields) - got)} and has unknown {sorted(got - set(fields))}; "
                "export and build again"
            )
        for name, kind in fields.items():
            value = values[name]
            if kind == "int":
                holds = type(value) is int and value >= 0
            elif kind == "str":
                holds = isinstance(value, str)
            else:
                holds = isinstance(value, list) and value and all(type(item) is int for item in value)
            if not holds:
                raise InvalidBundle(f"{where}: geometry.{name} is {value!r}, expected {kind}; export and build again")
        return cls(**{**values, "eos_token_ids": tuple(values["eos_token_ids"])})


@dataclass(frozen=True)
class Bundle:
    """An opened engine bundle.

    Attributes
    ----------
    path : Path
    manifest : dict
        As in ``manifest.json``.
    digest : str
        SHA-256 of ``manifest.json``, which holds those of all other files: it identifies the bundle.
    geometry : Geometry
    """

    path: Path
    manifest: dict
    digest: str
    geometry: Geometry

    @property
    def engine(self) -> str:
        """What runs the decoder: one of `recipe.DECODER_ENGINES`."""
        return self.manifest["engine"]

    @property
    def vision_engine(self) -> str:
        """What runs the vision graph."""
        return self.manifest["vision_engine"]

    @property
    def precision(self) -> str:
        return self.manifest["precision"]

    @property
    def vision_precision(self) -> str:
        """What the vision graph computes in."""
        recipe = self.manifest.get("recipe")
        return recipe["vision"]["precision"] if recipe else self.geometry.compute

    @cached_property
    def profile(self) -> ModelProfile:
        """The bundle's `ModelProfile`."""
        return load_profile(self.path / "profile.yaml")

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True, progress: Progress | None = None) -> Bundle:
        """Open a bundle and check it.

        Parameters
        ----------
        path : str or Path
            The bundle's folder.
        verify : bool
            Hash every file; if False only names and sizes are compared.
        progress : callable, optional
            Called with a file's name and the bytes just hashed.

        Raises
        ------
        InvalidBundle
            A file is missing, unknown or changed, the manifest is of another schema, or the bundle was built for a
            newer ONNX Runtime than the installed one. Whether a plan fits the installed TensorRT and the GPU is known
            when a session is opened.
        """
        path = Path(path)
        raw = _read(path / MANIFEST)
        try:
            manifest = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise InvalidBundle(f"{MANIFEST} is not JSON ({error}); build the bundle again") from None
        _check_manifest(manifest)
        _check_files(path, manifest, verify, progress)
        _check_runtime(manifest)
        geometry = Geometry.from_json(manifest["geometry"], MANIFEST)
        return cls(path, manifest, hashlib.sha256(raw).hexdigest(), geometry)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidBundle(
            f"cannot read {path.name} in {path.parent} ({error.strerror}); give the folder that cxr-triton build wrote"
        ) from None


def _check_manifest(manifest: object) -> None:
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        raise InvalidBundle(f"{MANIFEST} has schema {schema!r}, this cxr-triton reads {SCHEMA}; build the bundle again")
    kinds = {"engine": str, "vision_engine": str, "precision": str}
    kinds |= dict.fromkeys(("versions", "source", "geometry", "files"), dict)
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise InvalidBundle(f"{MANIFEST}: {key} is missing or no {kind.__name__}; build the bundle again")
    for key, known in (("engine", DECODER_ENGINES), ("vision_engine", ENGINES)):
        if manifest[key] not in known:
            raise InvalidBundle(
                f"{MANIFEST}: {key} {manifest[key]!r:.40}, this cxr-triton runs {', '.join(known)}; build the bundle "
                "again"
            )
    for name, entry in manifest["files"].items():
        # A name that leaves the folder would let a bundle vouch for, or load, another file of the machine.
        if (not _FILE_NAME.fullmatch(name) and name not in _TENSORRT_LLM_PATHS) or name == MANIFEST:
            raise InvalidBundle(f"{MANIFEST}: {name[:80]!r} is no plain file name; build the bundle again")
        if not (
            isinstance(entry, dict)
            and type(entry.get("bytes")) is int
            and isinstance(entry.get("sha256"), str)
            and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        ):
            raise InvalidBundle(f"{MANIFEST}: the entry of {name} lacks bytes or sha256; build the bundle again")


def graph_files(graph: str, engine: str) -> tuple[str, ...]:
    """Names of the files that hold a graph for an engine."""
    if engine == "tensorrt-llm":
        return _TENSORRT_LLM_PATHS
    onnx = ("onnx", "onnx.data")
    suffixes = {"onnxruntime": onnx, "onnxruntime-cuda": onnx, "openvino": ("xml", "bin")}.get(engine, ("plan",))
    return tuple(f"{graph}.{suffix}" for suffix in suffixes)


def _check_files(path: Path, manifest: dict, verify: bool, progress: Progress | None) -> None:
    files, present = manifest["files"], _present(path)
    graphs = graph_files("vision", manifest["vision_engine"]) + graph_files("decoder", manifest["engine"])
    if missing := sorted({*files, *SIDE_FILES, *graphs} - (present & set(files))):
        raise InvalidBundle(f"{missing[0]} is missing from {path} or its manifest; build the bundle again")
    if unknown := sorted(present - set(files)):
        raise InvalidBundle(f"{unknown[0]} in {path} is not in the manifest; remove it or build the bundle again")
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise InvalidBundle(f"{name} in {path} is not a regular file; build the bundle again")
        if (size := file.stat().st_size) != entry["bytes"]:
            raise InvalidBundle(f"{name} has {size} bytes, its manifest says {entry['bytes']}; build the bundle again")
        if verify and (digest := sha256(file, progress)) != entry["sha256"]:
            raise InvalidBundle(
                f"{name} has SHA-256 {digest[:12]}…, its manifest says {entry['sha256'][:12]}…; build the bundle again"
            )


def _present(path: Path) -> set[str]:
    """Names of what lies in a bundle besides its manifest."""
    names = {item.name for item in path.iterdir()} - {MANIFEST}
    inner = path / TENSORRT_LLM
    if inner.is_dir():
        names = names - {TENSORRT_LLM} | {f"{TENSORRT_LLM}/{item.name}" for item in inner.iterdir()}
    return names


def _check_runtime(manifest: dict) -> None:
    """Newer runtimes read graphs of older ones, not the other way round."""
    for engine in sorted({manifest["engine"], manifest["vision_engine"]}.intersection(CPU_ENGINES)):
        try:
            installed = metadata.version(engine)
        except metadata.PackageNotFoundError:
            continue  # a machine that only packages a bundle has none
        built = manifest["versions"].get(engine)
        if not isinstance(built, str) or _major_minor(installed) < _major_minor(built):
            raise InvalidBundle(
                f"the bundle was built with {engine} {built}, {installed} is installed; "
                f"install {engine} {built} or newer, or build the bundle again here"
            )


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def sha256(path: Path, progress: Progress | None = None) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            if progress:
                progress(path.name, len(block))
    return digest.hexdigest()


def build_bundle(
    export_dir: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    compiler: str = "onnxruntime",
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Compile an export folder into an engine bundle.

    `out` appears complete or not at all.

    Parameters
    ----------
    export_dir : str or Path
        What `cxr-triton export` wrote.
    out : str or Path
        Must not exist, or be an empty folder.
    recipe : Recipe, optional
        Names the compilers and the shapes; TensorRT needs one.
    compiler : str
        ``onnxruntime``, where there is no recipe.
    cache : str or Path, optional
        Folder of a `PlanCache`; without it plans and engines are always built.
    progress : callable, optional
        Called with a file's name and the bytes just copied or hashed.

    Returns
    -------
    Bundle

    Raises
    ------
    InvalidRequest
        `out` is in use, the compiler is unknown or needs a recipe, or the export is not what the recipe asks for.
    InvalidBundle
        The export folder is incomplete, or its precision does not run on this compiler.
    InvalidProfile
        Its `profile.yaml` is none.
    DeviceUnavailable
        The compiler, or the GPU that it needs, is missing.
    BuildFailed
        The compiler refuses a graph. `trtllm-build` leaves its log beside `out`.
    """
    source, out = Path(export_dir), Path(out)
    engines = {"vision": recipe.vision.compiler, "decoder": recipe.decoder.compiler} if recipe else None
    if engines is None:
        if compiler != "onnxruntime":
            known = f"{compiler} needs a recipe" if compiler in ENGINES else f"compiler {compiler!r} is unknown"
            raise InvalidRequest(f"{known}; use onnxruntime, or name a recipe, see `cxr-triton recipes`")
        engines = dict.fromkeys(GRAPHS, compiler)
    require_new(out)
    export, geometry = read_export(source, recipe)
    llm = None
    if engines["decoder"] == "tensorrt-llm":
        from cxr_triton.engines.tensorrt_llm.build import DecoderBuild

        llm = DecoderBuild.prepare(source, out, geometry, recipe)
    with new_folder(out) as partial:
        plans, versions = {}, {}
        for graph, engine in engines.items():
            if engine == "tensorrt-llm":
                plans[graph] = llm.run(partial / TENSORRT_LLM, cache, progress)
                versions |= {"tensorrt-llm": llm.tool.tensorrt_llm, "tensorrt": llm.tool.tensorrt}
                continue
            if engine not in GRAPH_ENGINES:
                plans[graph] = _build_plan(source, partial, graph, engine, export, recipe, cache, progress)
                versions[engine] = plans[graph]["version"]
                continue
            if engine == "openvino":
                from cxr_triton.engines.openvino.compiler import compile_graph

                precision = recipe.vision.precision if graph == "vision" else "fp32"
                versions[engine] = compile_graph(source / f"{graph}.onnx", partial, precision)
                continue
            if engine == "onnxruntime-cuda":
                from cxr_triton.engines.onnxruntime_cuda.compiler import compile_graph

                compile_graph(source / f"{graph}.onnx", partial, geometry.max_sequence)
                continue
            versions[engine] = metadata.version("onnxruntime")
            if graph == "decoder":
                compile_decoder(source / "decoder.onnx", partial / "decoder.onnx")
        files = {name: _entry(partial / name, progress) for name in sorted(_present(partial))}
        names = SIDE_FILES + tuple(name for graph, engine in engines.items() for name in graph_files(graph, engine))
        files |= {name: _copy(source / name, partial / name, progress) for name in names if name not in files}
        manifest = {
            "schema": SCHEMA,
            "engine": engines["decoder"],
            "vision_engine": engines["vision"],
            "precision": export["precision"],
            "head": export.get("head"),
            "recipe": recipe.to_json() if recipe else None,
            "versions": export["versions"] | {"cxr_triton": __version__, **versions},
            "source": export["source"],
            "geometry": export["geometry"],
            "files": files,
        }
        if plans:
            from cxr_triton.engines.tensorrt.compiler import container_match

            manifest["plans"] = plans
            manifest["compute_capabilities"] = sorted({plan["compute_capability"] for plan in plans.values()})
            if "tensorrt" in versions:
                manifest["container"] = container_match(recipe.container, versions["tensorrt"])
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return Bundle.open(out, verify=False)


def _build_plan(
    source: Path,
    folder: Path,
    graph: str,
    engine: str,
    export: dict,
    recipe: Recipe,
    cache: str | Path | None,
    progress: Progress | None,
) -> dict:
    """Put a graph's plan into `folder`, from the cache if it is there; gives the build report."""
    from cxr_triton.engines.tensorrt.compiler import compile_graph, load_library, shape_ranges, target

    library, plan = load_library(engine, graph), folder / f"{graph}.plan"
    geometry = Geometry.from_json(export["geometry"], EXPORT)
    chosen = target(engine, recipe)
    ranges = shape_ranges(graph, geometry, recipe, load_profile(source / "profile.yaml").max_images)
    kept = PlanCache(Path(cache)) if cache else None
    if kept:
        key = plan_key(
            {
                "graphs": [sha256(source / name, progress) for name in graph_files(graph, "onnxruntime")],
                "shapes": ranges,
                "max_sequence": geometry.max_sequence,
                "engine": engine,
                "version": library.__version__,
                "cxr_triton": __version__,
                **dataclasses.asdict(chosen),
            }
        )
        if report := kept.get(key, plan):
            return report
        timing = kept.folder / f"timing-{engine}-{library.__version__}-{chosen.compute_capability}.cache"
    report = compile_graph(
        engine,
        source / f"{graph}.onnx",
        plan,
        ranges,
        max_sequence=geometry.max_sequence,
        target=chosen,
        timing_cache=timing if kept and engine == "tensorrt" else None,
    )
    if kept:
        kept.put(key, plan, report)
    return report


def read_export(source: Path, recipe: Recipe | None) -> tuple[dict, Geometry]:
    """What `export.json` holds and its geometry, both cut to a recipe's length; errors as `build_bundle`."""
    engines = {"vision": recipe.vision.compiler, "decoder": recipe.decoder.compiler} if recipe else None
    export = _read_export(source, engines or dict.fromkeys(GRAPHS, "onnxruntime"))
    if recipe:
        _check_recipe(export, recipe)
        longest = min(recipe.max_sequence, export["geometry"]["max_sequence"])
        export["geometry"] = export["geometry"] | {"max_sequence": longest}
    return export, Geometry.from_json(export["geometry"], EXPORT)


def _check_recipe(export: dict, recipe: Recipe) -> None:
    """Refuse an export of other types than the recipe's."""
    wanted = {name: getattr(recipe.decoder, name) for name in ("precision", "compute", "head")}
    has = {"precision": export["precision"], "compute": export["geometry"]["compute"], "head": export.get("head")}
    if has != wanted:
        raise InvalidRequest(
            f"the export has {_listed(has)}, recipe {recipe.name} asks for {_listed(wanted)}; export with "
            f"--precision {wanted['precision']} --compute {wanted['compute']} --head {wanted['head']}"
        )


def _listed(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _read_export(source: Path, engines: dict[str, str]) -> dict:
    try:
        export = json.loads((source / EXPORT).read_bytes())
    except OSError as error:
        raise InvalidBundle(
            f"cannot read {EXPORT} in {source} ({error.strerror}); give the folder that cxr-triton export wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InvalidBundle(f"{source / EXPORT} is not JSON ({error}); export again") from None
    if not isinstance(export, dict) or export.get("schema") != SCHEMA:
        schema = export.get("schema") if isinstance(export, dict) else None
        raise InvalidBundle(f"{EXPORT} has schema {schema!r}, this cxr-triton reads {SCHEMA}; export again")
    for key, kind in {"precision": str, "geometry": dict, "source": dict, "versions": dict}.items():
        if not isinstance(export.get(key), kind):
            raise InvalidBundle(f"{EXPORT}: {key} is missing or no {kind.__name__}; export again")
    geometry = Geometry.from_json(export["geometry"], EXPORT)
    form = "tensorrt-llm" if engines["decoder"] == "tensorrt-llm" else "onnx"
    if (has := export.get("format", "onnx")) != form:
        raise InvalidRequest(
            f"the export has its decoder in format {has}, {engines['decoder']} takes {form}; name a recipe for {has}, "
            f"see `cxr-triton recipes`, or export with --format {form}"
        )
    if on_cpu := [engine for engine in engines.values() if engine in CPU_ENGINES and geometry.compute != "fp32"]:
        raise InvalidBundle(
            f"the graphs compute in {geometry.compute}, {on_cpu[0]} on a CPU runs fp32; "
            "export with precision fp32, or int4 with fp32 compute, or name a recipe for this type"
        )
    graphs = ("vision",) if form == "tensorrt-llm" else GRAPHS
    for name in (*SIDE_FILES, *(name for graph in graphs for name in graph_files(graph, "onnxruntime"))):
        if not (source / name).is_file():
            raise InvalidBundle(f"{name} is missing in {source}; export again")
    for name in SIDE_FILES:
        _check_side_file(source / name)
    load_profile(source / "profile.yaml")
    for graph in graphs:
        _check_graph(source / f"{graph}.onnx")
    return export


def _check_side_file(path: Path) -> None:
    """Refuse an empty file, and half of a JSON file."""
    text = path.read_bytes()
    try:
        whole = bool(text.strip()) and (path.suffix != ".json" or isinstance(json.loads(text), dict))
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise InvalidBundle(f"{path} of {len(text)} bytes is cut off or damaged; export again")


def _check_graph(path: Path) -> None:
    """Refuse a graph that does not end, or whose data file ends before its last tensor."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError:
        graph = None
    if graph is None or not graph.output:
        raise InvalidBundle(f"{path} of {path.stat().st_size} bytes is cut off or damaged; export again")
    needed = 0
    for tensor in graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        needed = max(needed, int(where.get("offset", 0)) + int(where.get("length", 0)))
    data = path.with_name(f"{path.name}.data")
    if (size := data.stat().st_size) < needed:
        raise InvalidBundle(f"{data} has {size} bytes, its graph needs {needed}: it is cut off; export again")


def _copy(source: Path, target: Path, progress: Progress | None) -> dict:
    """Copy a file and give its manifest entry from the same pass."""
    digest, size = hashlib.sha256(), 0
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while block := reader.read(_READ_BYTES):
            writer.write(block)
            digest.update(block)
            size += len(block)
            if progress:
                progress(source.name, len(block))
    return {"bytes": size, "sha256": digest.hexdigest()}


def _entry(path: Path, progress: Progress | None) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256(path, progress)}
