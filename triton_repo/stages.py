"""Stages of a long run: each leaves a folder that appears complete or not at all, and a key that says what of.

A run that was killed goes on where it stopped; a stage whose key has changed is made again, with all that follow it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cxr_triton.errors import InvalidRequest
from cxr_triton.files import locked, write

SCHEMA = 1
STATE = ".stages.json"


class Stages:
    """Runs the stages of one folder and remembers which of them are done; see `opened`.

    Parameters
    ----------
    folder : Path
    of : object
        Plain values that all stages are made from.
    say : callable
        Called with a line for each stage.

    Attributes
    ----------
    done : list of dict
        Of each stage ``stage``, ``cached`` and ``seconds``.
    """

    def __init__(self, folder: Path, of: object, say: Callable[[str], None]):
        self.folder, self.done = folder, list[dict]()
        self._say, self._key, self._stale = say, of, False  # stale: a stage before was made anew
        try:
            state = json.loads((folder / STATE).read_bytes())
        except (OSError, ValueError, RecursionError):
            state = None
        self._state: dict = state if isinstance(state, dict) and state.get("schema") == SCHEMA else {"schema": SCHEMA}

    def run(
        self,
        name: str,
        inputs: object,
        make: Callable[[Path], object],
        *,
        is_whole: Callable[[Path], bool] = Path.is_dir,
    ) -> Path:
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
            self._say(f"{name}: as it was")
            return path
        if not self._stale:
            self._forget_the_rest()
        self._stale = True
        shutil.rmtree(path, ignore_errors=True)
        self._say(f"{name}: started")
        started_s = time.monotonic()
        make(path)
        seconds = round(time.monotonic() - started_s, 1)
        self._state[name] = self._key
        write(self.folder / STATE, json.dumps(self._state, indent=1) + "\n")
        self.done.append({"stage": name, "cached": False, "seconds": seconds})
        self._say(f"{name}: done in {seconds} s")
        return path

    def _forget_the_rest(self) -> None:
        """What was made behind the stages that are done belongs to another run."""
        for name in set(self._state) - {"schema", *(stage["stage"] for stage in self.done)}:
            del self._state[name]
            shutil.rmtree(self.folder / name, ignore_errors=True)


@contextlib.contextmanager
def opened(folder: Path, of: object, say: Callable[[str], None]) -> Iterator[Stages]:
    """`Stages` of a folder, for one process alone, without what a killed one left half made.

    Raises
    ------
    InvalidRequest
        Another process has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", f"another make-engine works in {folder}; wait for it, or choose another folder"):
        for stale in folder.glob(".*"):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
        yield Stages(folder, of, say)


def fingerprint(folder: Path) -> list:
    """Names, sizes and times of the files of a folder: enough to see that one was exchanged, and quick for a 3B.

    Raises
    ------
    InvalidRequest
        The folder holds no files.
    """
    root = folder.resolve()
    files = sorted(file for file in root.rglob("*") if file.is_file())
    if not files:
        raise InvalidRequest(f"{folder} holds no files; give another folder")
    facts = ((file, file.stat()) for file in files)
    return [[str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns] for file, stat in facts]
