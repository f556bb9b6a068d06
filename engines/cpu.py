"""The processor that this runs on, as far as the speed of an engine depends on it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """A processor, and how much of it a process gets.

    Attributes
    ----------
    model : str
        Name of the first core; empty where Linux tells none.
    flags : tuple of str
        Features, as Linux names them, sorted; none where it lists none.
    cores : int
        That this process may run on.
    """

    model: str
    flags: tuple[str, ...]
    cores: int

    @classmethod
    def of(cls, cpuinfo: str) -> Cpu:
        """Out of the text of /proc/cpuinfo; the cores are those of this process."""
        flags = tuple(sorted(set(_field(cpuinfo, "flags").split())))
        return cls(model=_field(cpuinfo, "model name"), flags=flags, cores=len(os.sched_getaffinity(0)))

    @classmethod
    def here(cls) -> Cpu:
        """The one that runs now."""
        try:
            return cls.of(CPUINFO.read_text(errors="replace"))
        except OSError:
            return cls.of("")

    @property
    def said(self) -> str:
        """As people name it."""
        return f"{self.model or platform.machine()} with {self.cores} core{'s' if self.cores != 1 else ''}"

    def to_json(self) -> dict:
        """Plain values, for `from_json`."""
        return asdict(self) | {"flags": list(self.flags)}

    @classmethod
    def from_json(cls, values: dict) -> Cpu:
        """Raises `KeyError`, `TypeError` or `ValueError` where the values are not those of `to_json`."""
        return cls(model=str(values["model"]), flags=tuple(map(str, values["flags"])), cores=int(values["cores"]))


def _field(cpuinfo: str, name: str) -> str:
    """Of the first core that has it."""
    rows = (line.partition(":") for line in cpuinfo.splitlines())
    return next((value.strip() for key, _, value in rows if key.strip() == name), "")
