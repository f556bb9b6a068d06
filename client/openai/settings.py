"""What the server listens on, and what it gives each request: frozen and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cxr_triton.client.door.settings import DoorSettings
from cxr_triton.config import in_range


@dataclass(frozen=True, kw_only=True)
class Settings(DoorSettings):
    """Options of `cxr-triton openai`, besides those of every door.

    Attributes
    ----------
    api_keys_file : Path, optional
        See `cxr_triton.client.openai.keys.Keys`; without it nobody is asked for a key.
    without_keys : bool
        Allows to listen off the loopback interface without keys.
    max_requests : int
        Completions under way; one more is `QUEUE_FULL`.
    max_body_mib, max_bodies_mib : int
        Largest body of a request, and of all that are on their way in; one more is `QUEUE_FULL`.
    """

    unlocked = (
        "anybody there could ask; give --api-keys-file, or --without-keys where something else lets nobody else through"
    )
    at_risk = "keys"

    api_keys_file: Path | None = None
    without_keys: bool = False
    max_requests: int = in_range(1, 10_000, default=64)
    max_body_mib: int = in_range(1, 1024, default=64)
    max_bodies_mib: int = in_range(1, 65536, default=256)

    @property
    def is_locked(self) -> bool:
        """By keys, or by what stands before it."""
        return self.api_keys_file is not None or self.without_keys
