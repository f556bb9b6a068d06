"""The settings of a repository that were found by measuring, and the record of it beside them: ``tune.json``.

The settings are where `package` writes them, in the models' configurations. The record says what else was measured, and
on which processor; it is a file of the repository as any other, with its digest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_triton.engines import ROOMS, engine
from cxr_triton.engines.cpu import Cpu
from cxr_triton.errors import InvalidBundle
from cxr_triton.files import new_folder
from cxr_triton.triton_repo.integrity import seal
from cxr_triton.triton_repo.package import take

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

RECORD = "tune.json"
SCHEMA = 1
_BATCH = "max_batch_size"
PLACES = {
    "threads": ("decoder", "threads"),
    "prefill_chunk": ("decoder", "prefill_chunk"),
    "slots": ("decoder", "slots"),
    "vision_threads": ("vision_encoder", "threads"),
    "vision_batch": ("vision_encoder", _BATCH),
}
"""Settings, by the names that `Settings` and the options of `package` have, and where a repository has them."""


def parameters_of(repository: Path, model: str) -> dict[str, str]:
    """Of a model's configuration, as text."""
    return {name: value.string_value for name, value in _config(repository / model).parameters.items()}


def settings_of(repository: Path) -> dict[str, int]:
    """What a repository is served with, of the settings in `PLACES` that it has."""
    found = {}
    for name, (model, key) in PLACES.items():
        config = _config(repository / model)
        if key == _BATCH:
            found[name] = config.max_batch_size
        elif key in config.parameters:
            found[name] = int(config.parameters[key].string_value)
    return found


def write_settings(repository: Path, chosen: Mapping[str, int], record: dict) -> None:
    """Give a repository other settings, and their record; all of it at once or nothing.

    Parameters
    ----------
    repository : Path
        As `package` wrote it, and served by nobody. Files of 64 MiB and more take no new room, see `package.take`.
    chosen : mapping
        Settings to their values; others stay.
    record : dict
        Becomes ``tune.json``.

    Raises
    ------
    OSError
        The folder cannot be exchanged.
    """
    from google.protobuf import text_format

    repository = repository.resolve()  # a link to it stays one
    configs: dict[str, ModelConfig] = {}
    for name, value in chosen.items():
        model, key = PLACES[name]
        config = configs.setdefault(model, _config(repository / model))
        if key == _BATCH:
            config.max_batch_size = value
        else:
            config.parameters[key].string_value = str(value)
    with new_folder(repository, replaces=True) as new:
        shutil.copytree(repository, new, copy_function=_take, dirs_exist_ok=True)
        for model, config in configs.items():
            (new / model / "config.pbtxt").write_text(text_format.MessageToString(config))
        (new / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        seal(new)


def record_of(repository: Path) -> dict | None:
    """The record; None of a repository that was not tuned.

    Raises
    ------
    InvalidBundle
        It cannot be read.
    """
    try:
        record = json.loads((repository / RECORD).read_bytes())
        if record["schema"] != SCHEMA:
            raise ValueError
        Cpu.from_json(record["cpu"])
        {**record["versions"]}
        str(record["date"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise InvalidBundle(f"{repository / RECORD} cannot be read; tune the repository again") from None
    return record


def differences(record: dict, cpu: Cpu) -> list[str]:
    """What is otherwise than where a record was made, a phrase each; only what the speed of an engine depends on."""
    was = Cpu.from_json(record["cpu"])
    found = []
    if was.model != cpu.model:
        found.append(f"the CPU is {cpu.model or 'unknown'}, it was {was.model or 'unknown'}")
    if was.cores != cpu.cores:
        found.append(f"there are {cpu.cores} cores, there were {was.cores}")
    known = {flag for name in ROOMS for flag in engine(name).cpu_features}
    new, gone = (sorted(known & flags) for flags in (set(cpu.flags) - set(was.flags), set(was.flags) - set(cpu.flags)))
    found += [f"{flag} is new" for flag in new] + [f"{flag} is missing" for flag in gone]
    return found


def other_versions(record: dict) -> list[str]:
    """Packages of the record's engines that are here in another version, a phrase each."""
    found = []
    for name, version in record["versions"].items():
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if here != version:
            found.append(f"{name} is {here}, it was {version}")
    return found


def complaint(repository: Path) -> str | None:
    """What to say where a repository is served on another CPU than it was tuned for; raises as `record_of`."""
    record = record_of(repository)
    found = differences(record, Cpu.here()) if record else []
    if not record or not found:
        return None
    return (
        f"{repository} was tuned on {Cpu.from_json(record['cpu']).said}, {record['date'][:10]}; here "
        f"{', '.join(found)}: run `cxr-triton tune {repository}` again"
    )


def _config(model: Path) -> ModelConfig:
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise InvalidBundle(f"{model / 'config.pbtxt'} cannot be read ({error}); package the bundle again") from None


def _take(source: str, target: str) -> None:
    take(Path(source), Path(target))
    if os.stat(source).st_mode != os.stat(target).st_mode:  # a hard link may be of another owner's file
        shutil.copymode(source, target)
