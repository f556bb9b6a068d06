"""API keys: a file with one a line, read again when it has changed."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from cxr_triton.errors import InvalidConfig

LEAST_CHARS, MOST_CHARS = 16, 512
MOST_KEYS = 1000
_MAKE = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))' >> keys"


class Keys:
    """Whoever knows one of them may ask. Only their digests are kept.

    A file that is gone or wrong opens to nobody until it is right again.

    Raises
    ------
    InvalidConfig
        It cannot be read, has no key, or a line that is none.
    """

    def __init__(self, path: Path):
        self._path = path
        self._digests: tuple[bytes, ...] = ()
        self._seen: tuple[int, ...] = ()
        self.refresh()

    def refresh(self) -> None:
        """Read the file if it is another than before; raises `InvalidConfig` as often as it is asked of a wrong one."""
        try:
            found = self._path.stat()
            seen = (found.st_ino, found.st_size, found.st_mtime_ns)
            if seen == self._seen:
                return
            self._digests, self._seen = (), ()
            lines = self._path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self._digests, self._seen = (), ()
            why = getattr(error, "strerror", None) or "it is not UTF-8"
            raise InvalidConfig(f"{self._path}: cannot be read ({why}); give a file with one key a line") from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        for number, key in enumerate(keys, 1):
            if not (LEAST_CHARS <= len(key) <= MOST_CHARS and all("!" <= c <= "~" for c in key)):
                raise InvalidConfig(
                    f"{self._path}: key {number} has to be {LEAST_CHARS} to {MOST_CHARS} printable ASCII characters "
                    f"without blanks; make one: {_MAKE}"
                )
        if not 1 <= len(keys) <= MOST_KEYS:
            raise InvalidConfig(f"{self._path}: has {len(keys)} keys, allowed 1 to {MOST_KEYS}; make one: {_MAKE}")
        self._digests, self._seen = tuple(map(_digest, keys)), seen

    def allow(self, key: str) -> bool:
        """Whether it is one of them, in a time that says nothing of any."""
        self.refresh()
        digest, found = _digest(key), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found

    @property
    def is_open(self) -> bool:
        """Every user of this machine may read the file."""
        return bool(os.stat(self._path).st_mode & 0o004)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
