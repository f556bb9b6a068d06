"""What a server of the client's tells on its standard error: JSON lines without anything of a request's contents."""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any, TextIO


class Log:
    """One JSON object a line. It is never given texts, pictures, file names, keys or passwords."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr

    def __call__(self, event: str, **facts: Any) -> None:
        """Write a line."""
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._stream.write(json.dumps({"at": at, "event": event, **facts}) + "\n")
        self._stream.flush()
