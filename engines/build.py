"""An export folder, compiled into an engine bundle by the engines that a recipe names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cxr_triton import __version__
from cxr_triton.engines import DEFAULT, ROOMS, engine, without_adapter
from cxr_triton.engines.bundle import MANIFEST, SCHEMA, SIDE_FILES, Bundle, present_files
from cxr_triton.engines.digest import Progress, copy, sha256
from cxr_triton.engines.geometry import Geometry
from cxr_triton.engines.interface import Compiled, Engine
from cxr_triton.engines.recipe import CPU, Recipe, load_recipe
from cxr_triton.errors import InvalidBundle, InvalidRequest
from cxr_triton.files import new_folder, require_new
from cxr_triton.profile import load_profile

EXPORT = "export.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One graph of an export on its way into a bundle.

    Attributes
    ----------
    graph : str
        ``vision`` or ``decoder``.
    source : Path
        Export folder.
    geometry : Geometry
        Cut to the recipe's length.
    chosen : Recipe or None
    out : Path
        Of the bundle; what has to outlive a build that fails lies beside it.
    cache : Path, optional
        Folder of a `PlanCache`.
    progress : callable, optional
        See `digest.Progress`.
    """

    graph: str
    source: Path
    geometry: Geometry
    chosen: Recipe | None
    out: Path
    cache: Path | None = None
    progress: Progress | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe, of an engine that needs one."""
        if self.chosen is None:
            raise InvalidRequest("there is no recipe; name one, see `cxr-triton recipes`")
        return self.chosen


def build_bundle(
    export_dir: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    compiler: str = DEFAULT,
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
        Names the compilers and the shapes; all but the default engine need one.
    compiler : str
        Of both graphs, where there is no recipe.
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
        The compiler refuses a graph; where it is a tool, its log lies beside `out`.
    """
    source, out = Path(export_dir), Path(out)
    if recipe is None and (compiler not in ROOMS or engine(compiler).needs_recipe):
        known = f"{compiler} needs a recipe" if compiler in ROOMS else f"compiler {compiler!r} is unknown"
        raise InvalidRequest(f"{known}; use {DEFAULT}, or name a recipe, see `cxr-triton recipes`")
    engines = engines_of(recipe)
    require_new(out)
    export, geometry = read_export(source, recipe)
    kept = Path(cache) if cache else None
    compilers = {
        graph: each.prepare(
            Job(graph=graph, source=source, geometry=geometry, chosen=recipe, out=out, cache=kept, progress=progress)
        )
        for graph, each in engines.items()
    }
    with new_folder(out) as partial:
        compiled = {graph: run(partial) for graph, run in compilers.items()}
        digests = {
            name: sha256(partial / name, progress)
            for name in sorted(present_files(partial, engines["decoder"].folders))
        }
        names = SIDE_FILES + tuple(name for graph, each in engines.items() for name in each.files(graph))
        digests |= {name: copy(source / name, partial / name, progress) for name in names if name not in digests}
        files = {name: {"bytes": (partial / name).stat().st_size, "sha256": digests[name]} for name in digests}
        manifest = _manifest(export, recipe, engines, compiled) | {"files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return Bundle.open(out, verify=False)


def recipe_for(export_dir: str | Path) -> Recipe | None:
    """The recipe of this processor, where an export is what it builds; None: `DEFAULT` without one.

    Raises
    ------
    InvalidBundle
        The folder is no export.
    """
    export, chosen = _parsed_export(Path(export_dir)), load_recipe(CPU)
    length = export["geometry"].get("max_sequence")
    if export.get("format", "onnx") != "onnx" or not isinstance(length, int) or length > chosen.max_sequence:
        return None
    try:
        _check_recipe(export, chosen)
    except InvalidRequest:
        return None
    return chosen


def engines_of(recipe: Recipe | None) -> dict[str, Engine]:
    """Engine of each graph; without a recipe the one that needs none."""
    if recipe is None:
        return dict.fromkeys(("vision", "decoder"), engine(DEFAULT))
    return {"vision": engine(recipe.vision.compiler), "decoder": engine(recipe.decoder.compiler)}


def _manifest(export: dict, recipe: Recipe | None, engines: dict[str, Engine], compiled: dict[str, Compiled]) -> dict:
    """A manifest but for its files."""
    versions = export["versions"] | {"cxr_triton": __version__}
    for each in compiled.values():
        versions |= each.versions
    manifest = {
        "schema": SCHEMA,
        "engine": engines["decoder"].name,
        "vision_engine": engines["vision"].name,
        "precision": export["precision"],
        "head": export.get("head"),
        "recipe": recipe.to_json() if recipe else None,
        "versions": versions,
        "source": export["source"],
        "geometry": export["geometry"],
    }
    if export.get("adapter"):
        manifest["adapter"] = export["adapter"]
    if plans := {graph: each.plan for graph, each in compiled.items() if each.plan}:
        manifest["plans"] = plans
        manifest["compute_capabilities"] = sorted({plan["compute_capability"] for plan in plans.values()})
    for each in compiled.values():
        if each.container:
            manifest["container"] = each.container
    return manifest


def read_export(source: Path, recipe: Recipe | None) -> tuple[dict, Geometry]:
    """What `export.json` holds and its geometry, both cut to a recipe's length; errors as `build_bundle`."""
    export = _read_export(source, engines_of(recipe))
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


def _read_export(source: Path, engines: dict[str, Engine]) -> dict:
    export = _parsed_export(source)
    geometry, decoder = Geometry.from_json(export["geometry"], EXPORT), engines["decoder"]
    if (has := export.get("format", "onnx")) != decoder.form:
        raise InvalidRequest(
            f"the export has its decoder in format {has}, {decoder.name} takes {decoder.form}; name a recipe for "
            f"{has}, see `cxr-triton recipes`, or export with --format {decoder.form}"
        )
    for each in engines.values():
        if each.computes == ("fp32",) and geometry.compute != "fp32":
            raise InvalidBundle(
                f"the graphs compute in {geometry.compute}, {each.name} on a CPU runs fp32; "
                "export with precision fp32, or int4 with fp32 compute, or name a recipe for this type"
            )
    graphs = [graph for graph in engines if graph == "vision" or decoder.form == "onnx"]
    for name in (*SIDE_FILES, *(f"{graph}.{suffix}" for graph in graphs for suffix in ("onnx", "onnx.data"))):
        if not (source / name).is_file():
            raise InvalidBundle(f"{name} is missing in {source}; export again")
    for name in SIDE_FILES:
        _check_side_file(source / name)
    _check_adapter(export, source, decoder.name)
    for graph in graphs:
        _check_graph(source / f"{graph}.onnx")
    return export


def _check_adapter(export: dict, source: Path, decoder: str) -> None:
    """Refuse an adapter, named or held, for a decoder's engine that takes none; and one of another name or none."""
    held, profile = export.get("adapter"), load_profile(source / "profile.yaml")
    named = profile.adapter.name if profile.adapter else None
    if (held and held.get("name")) != named:
        raise InvalidBundle(f"profile.yaml in {source} names LoRA adapter {named}, {EXPORT} another; export again")
    if named and (fault := without_adapter(decoder, named)):
        raise InvalidRequest(fault)


def _parsed_export(source: Path) -> dict:
    """What `export.json` holds, its schema and the types of its values checked."""
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
    data = path.with_name(f"{path.name}.data")
    for tensor in graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        numbers = [where.get(key, "0") for key in ("offset", "length")]
        if where and (where.get("location") != data.name or not all(number.isdecimal() for number in numbers)):
            raise InvalidBundle(f"{path} takes {tensor.name!r:.80} from elsewhere than {data.name}; export again")
        needed = max(needed, sum(map(int, numbers)))
    if (size := data.stat().st_size) < needed:
        raise InvalidBundle(f"{data} has {size} bytes, its graph needs {needed}: it is cut off; export again")
