"""What the reading room listens on, and what it gives each session: frozen and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cxr_triton.client.door.settings import DoorSettings
from cxr_triton.config import in_range


@dataclass(frozen=True, kw_only=True)
class Settings(DoorSettings):
    """Options of `cxr-triton ui`, besides those of every door.

    Attributes
    ----------
    password_file : Path, optional
        File with the password of the login; without it there is none.
    max_sessions : int
        Browser tabs at once; one more is `QUEUE_FULL`.
    session_mib, sessions_mib : int
        What one session, and all together, may hold in memory: files, their pictures, readings.
    max_pictures, max_readings : int
        Of one session.
    max_under_way : int
        Readings of one session that are being written.
    idle_s : float
        After so long without a request a session ends.
    decoders : int
        Processes that decode uploaded files.
    """

    unlocked = "anybody there could look; give --password-file"
    at_risk = "password"

    password_file: Path | None = None
    max_sessions: int = in_range(1, 1000, default=32)
    session_mib: int = in_range(1, 16384, default=256)
    sessions_mib: int = in_range(1, 65536, default=2048)
    max_pictures: int = in_range(1, 100, default=16)
    max_readings: int = in_range(1, 1000, default=64)
    max_under_way: int = in_range(1, 16, default=4)
    idle_s: float = in_range(0.1, 86400.0, default=1800.0)
    decoders: int = in_range(1, 16, default=2)
    body_s: float = in_range(0.1, 600.0, default=120.0)
    grace_s: float = in_range(0.0, 3600.0, default=10.0)

    @property
    def is_locked(self) -> bool:
        """By a password."""
        return self.password_file is not None
