"""The secret of a server's life, and what the served models sign with it for each other.

Triton has no private models: whoever reaches the port may call `decoder` and `report` too. So what one model writes for
the next carries a seal that only a process of the same server can make.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections import OrderedDict

import numpy as np

from cxr_triton.errors import InvalidConfig, InvalidRequest

SECRET = "CXR_TRITON_SECRET"  # noqa: S105  # the environment variable's name
LEAST_CHARACTERS = 32
MAX_AGE_S = 3600.0
"""From preprocessing to the decoder, all queues included; what is older is refused."""
_STAMP, _MAC = 52, 64  # characters: monotonic ns and 16 random bytes; SHA-256 in hex


def secret_of(environment) -> str:
    """The secret that an environment names, or a fresh one.

    Raises
    ------
    InvalidConfig
        It is too short to be one.
    """
    secret = environment.get(SECRET) or secrets.token_hex(32)
    if len(secret) < LEAST_CHARACTERS:
        raise InvalidConfig(
            f"{SECRET} has {len(secret)} characters, must have at least {LEAST_CHARACTERS}; leave it out for one of "
            "the server's own, or take `openssl rand -hex 32`"
        )
    return secret


def derived(secret: str, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose; it gives neither the secret away nor the key of another purpose."""
    return hmac.digest(secret.encode(), purpose.encode(), "sha256")


class Seal:
    """What the models of a server sign one tensor with.

    Parameters
    ----------
    tensor : str
        Its name; a seal of another tensor does not open.
    secret : str, optional
        By default that of this process's environment.

    Raises
    ------
    InvalidConfig
        The environment has none: the server was started by hand and without it.
    """

    def __init__(self, tensor: str, secret: str | None = None):
        if secret is None and not os.environ.get(SECRET):
            raise InvalidConfig(
                f"no {SECRET} in the environment, by which the models of a server know each other; start it with "
                "`cxr-triton serve`, or by hand as `python3 -m cxr_triton.triton_repo.guard tritonserver …`"
            )
        self.tensor = tensor
        self._key = derived(secret or secret_of(os.environ), tensor)
        self._used: OrderedDict[str, int] = OrderedDict()

    def close(self, text: str, *bound: np.ndarray) -> str:
        """The text under seal, together with the arrays that belong to it and travel beside it."""
        stamp = f"{time.monotonic_ns():020d}{secrets.token_hex(16)}"
        return f"{stamp}{self._mac(stamp, text, bound)}{text}"

    def open(self, sealed: str, *bound: np.ndarray) -> str:
        """Inverse of `close`.

        Raises
        ------
        InvalidRequest
            Text or arrays are not as a model of this server wrote them.
        """
        stamp, mac, text = sealed[:_STAMP], sealed[_STAMP : _STAMP + _MAC], sealed[_STAMP + _MAC :]
        if not hmac.compare_digest(mac.encode(), self._mac(stamp, text, bound).encode()):
            raise InvalidRequest(
                f"{self.tensor} and what belongs to it are not as a model of this server wrote them; call the ensemble "
                "cxr_reader"
            )
        return text

    def open_once(self, sealed: str, *bound: np.ndarray) -> str:
        """As `open`, and only once, within `MAX_AGE_S` of `close` on the same machine."""
        text, stamp = self.open(sealed, *bound), sealed[:_STAMP]
        oldest_ns = time.monotonic_ns() - int(1e9 * MAX_AGE_S)
        while self._used and next(iter(self._used.values())) < oldest_ns:
            self._used.popitem(last=False)
        made_ns = int(stamp[:20])
        if made_ns < oldest_ns or stamp in self._used:
            raise InvalidRequest(f"{self.tensor} was used before or is too old; call the ensemble cxr_reader")
        self._used[stamp] = made_ns
        return text

    def _mac(self, stamp: str, text: str, bound: tuple[np.ndarray, ...]) -> str:
        mac = hmac.new(self._key, digestmod=hashlib.sha256)
        described = (part for array in bound for part in (f"{array.dtype.str}{array.shape}".encode(), array.tobytes()))
        for part in (stamp.encode(), text.encode(), *described):
            mac.update(len(part).to_bytes(8, "little"))
            mac.update(part)
        return mac.hexdigest()
