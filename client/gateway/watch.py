"""A watched folder as a way in."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import sqlalchemy.exc

from cxr_triton.client.gateway.config import Folder
from cxr_triton.client.gateway.intake import MIB, Intake
from cxr_triton.errors import InvalidImage, QueueFull


class FolderWatcher:
    """Takes files of a folder that no longer grow; refused ones move to ``rejected/``.

    `scan` is called again and again; a file is taken when two scans in a row saw it with the same size and time.
    """

    def __init__(self, config: Folder, intake: Intake):
        self._intake = intake
        self.folder = Path(config.path)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._seen: dict[Path, tuple[int, int]] = {}

    def scan(self) -> int:
        """How many files were taken."""
        now: dict[Path, tuple[int, int]] = {}
        for path in sorted(self.folder.iterdir()):
            if path.is_symlink() or not path.is_file() or path.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                now[path] = (stat.st_size, stat.st_mtime_ns)
        taken = sum(self._take(path) for path, facts in now.items() if self._seen.get(path) == facts)
        self._seen = {path: facts for path, facts in now.items() if path.exists()}
        return taken

    def _take(self, path: Path) -> int:
        try:
            self._intake.require_room()
            with open(path, "rb") as file, self._intake.new_file() as copy:
                shutil.copyfileobj(file, copy, MIB)
                self._intake.take(copy, "folder", "folder")
        except InvalidImage:
            rejected = self.folder / "rejected"
            rejected.mkdir(exist_ok=True)
            os.replace(path, rejected / path.name)
            return 0
        except (QueueFull, OSError, sqlalchemy.exc.SQLAlchemyError):
            return 0  # it stays for the next scan
        path.unlink()
        return 1
