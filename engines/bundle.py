"""Engine bundle: a folder of graphs, weights, tokenizer and profile, and the manifest that vouches for each file.

`build` makes one; what its engines say of their files, and how these are run, `interface.Engine` has.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_triton.engines import engine, engine_names, require_ability, without_adapter
from cxr_triton.engines.digest import Progress, sha256
from cxr_triton.engines.geometry import Geometry
from cxr_triton.engines.interface import ADAPTER
from cxr_triton.errors import InvalidBundle
from cxr_triton.profile import ModelProfile, load_profile

if TYPE_CHECKING:
    from cxr_triton.engines.session import DecoderSession, VisionSession

SCHEMA = 1
MANIFEST = "manifest.json"
SIDE_FILES = (
    "profile.yaml",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


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
        """Name of what runs the decoder."""
        return self.manifest["engine"]

    @property
    def vision_engine(self) -> str:
        """Name of what runs the vision graph."""
        return self.manifest["vision_engine"]

    @property
    def precision(self) -> str:
        """Of the decoder's weights."""
        return self.manifest["precision"]

    @property
    def vision_precision(self) -> str:
        """What the vision graph computes in."""
        vision = (self.manifest.get("recipe") or {}).get("vision")
        return vision["precision"] if vision else self.geometry.compute

    @property
    def is_on_cpu(self) -> bool:
        """It was built for a CPU."""
        return not (self.manifest.get("recipe") or {}).get("compute_capability")

    @cached_property
    def profile(self) -> ModelProfile:
        """The bundle's `ModelProfile`."""
        profile = load_profile(self.path / "profile.yaml", alone=True)
        named, held = profile.adapter and profile.adapter.name, self.adapter and self.adapter["name"]
        if named != held:
            raise InvalidBundle(
                f"the profile of {self.path} names LoRA adapter {named}, {MANIFEST} {held}; build the bundle again"
            )
        return profile

    @property
    def adapter(self) -> dict | None:
        """``name`` and ``sha256``, of its weights, of the LoRA adapter that the decoder runs with."""
        found = self.manifest.get("adapter")
        return found and {"name": found["name"], "sha256": found["files"][ADAPTER_FILES[1]]}

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
            newer library than the installed one. Whether a plan fits the library and the GPU that are here is known
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
        for name in sorted({manifest["engine"], manifest["vision_engine"]}):
            engine(name).check_installed(manifest["versions"])
        geometry = Geometry.from_json(manifest["geometry"], MANIFEST)
        return cls(path, manifest, hashlib.sha256(raw).hexdigest(), geometry)

    def open_vision(self, *, threads: int | None = None) -> VisionSession:
        """A session of the vision graph.

        Parameters
        ----------
        threads : int, optional
            CPU threads; all cores if None.

        Raises
        ------
        DeviceUnavailable, InvalidBundle
            The engine's library or GPU is missing, or is another one than the bundle was built for.
        """
        return engine(self.vision_engine).open_vision(self, threads=threads)

    def open_decoder(self, *, slots: int, threads: int | None = None, batch_invariant: bool = False) -> DecoderSession:
        """A session of the decoder.

        Parameters
        ----------
        slots : int
            Sequences that its cache holds.
        threads : int, optional
            CPU threads; all cores if None.
        batch_invariant : bool
            Give a stream the same numbers bit by bit whatever runs beside it, which few engines can.

        Raises
        ------
        DeviceUnavailable, InvalidBundle
            As `open_vision`; or the engine runs in Triton only.
        InvalidRequest
            The engine is not batch-invariant, or has fewer slots.
        """
        if batch_invariant:
            require_ability(self.engine, "batch_invariant")
        return engine(self.engine).open_decoder(self, slots=slots, threads=threads, batch_invariant=batch_invariant)


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
    kinds: dict[str, type] = dict.fromkeys(("engine", "vision_engine", "precision"), str)
    kinds |= dict.fromkeys(("versions", "source", "geometry", "files"), dict)
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise InvalidBundle(f"{MANIFEST}: {key} is missing or no {kind.__name__}; build the bundle again")
    for key, known in (("engine", engine_names()), ("vision_engine", engine_names("vision"))):
        if manifest[key] not in known:
            raise InvalidBundle(
                f"{MANIFEST}: {key} {manifest[key]!r:.40}, this cxr-triton runs {', '.join(known)}; build the bundle "
                "again"
            )
    folders = engine(manifest["engine"]).folders
    for name, entry in manifest["files"].items():
        # A name that leaves the folder would let a bundle vouch for, or load, another file of the machine.
        folder, _, plain = name.rpartition("/")
        plain = plain if folder in ("", *folders) else name
        if not _FILE_NAME.fullmatch(plain) or name == MANIFEST:
            raise InvalidBundle(f"{MANIFEST}: {name[:80]!r} is no plain file name; build the bundle again")
        if not (
            isinstance(entry, dict)
            and type(entry.get("bytes")) is int
            and isinstance(entry.get("sha256"), str)
            and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        ):
            raise InvalidBundle(f"{MANIFEST}: the entry of {name} lacks bytes or sha256; build the bundle again")
    _check_adapter(manifest)


def _check_adapter(manifest: dict) -> None:
    """The adapter is one that the engine takes, and its files are those that were exported."""
    adapter, held = manifest.get("adapter"), {}
    if adapter is not None:
        if not isinstance(adapter, dict) or not all(
            isinstance(adapter.get(key), kind) for key, kind in (("name", str), ("rank", int), ("files", dict))
        ):
            raise InvalidBundle(f"{MANIFEST}: adapter lacks name, rank or files; build the bundle again")
        if fault := without_adapter(manifest["engine"], adapter["name"]):
            raise InvalidBundle(fault)
        held = {f"{ADAPTER}/{name}": adapter["files"].get(name) for name in ADAPTER_FILES}
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.startswith(f"{ADAPTER}/")}
    if files != held:
        raise InvalidBundle(f"{MANIFEST}: the files in {ADAPTER}/ are not those of its adapter; export and build again")


def _check_files(path: Path, manifest: dict, verify: bool, progress: Progress | None) -> None:
    decoder, vision = engine(manifest["engine"]), engine(manifest["vision_engine"])
    files, present = manifest["files"], present_files(path, decoder.folders)
    graphs = vision.files("vision") + decoder.files("decoder")
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


def present_files(path: Path, folders: Sequence[str]) -> set[str]:
    """Names of what lies in a bundle besides its manifest; what lies in one of `folders` has it before its name."""
    names = {item.name for item in path.iterdir()} - {MANIFEST}
    for folder in folders:
        if (path / folder).is_dir():
            names = names - {folder} | {f"{folder}/{item.name}" for item in (path / folder).iterdir()}
    return names
