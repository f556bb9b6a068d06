"""Where a server is: host and port, as gRPC takes them. Imports no gRPC."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from cxr_triton.errors import InvalidRequest

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
"""Networks of this machine's loopback interface."""


def require_endpoint(url: str) -> str:
    """`url` where it is a host and a port, or a target of gRPC's with its scheme, such as ``dns:`` or ``unix:``.

    Raises
    ------
    InvalidRequest
        It is neither; says how to write it.
    """
    if re.match(r"(dns|unix|unix-abstract|ipv4|ipv6|xds|vsock):", url):
        return url
    scheme, _, rest = url.rpartition("://")
    host, _, port = rest.split("/")[0].rpartition(":")
    if scheme:
        right = f"{host or rest.split('/')[0]}:{8001 if port in ('', '8000') or not host else port}"
        raise InvalidRequest(f"{url!r} is a web address and readings travel by gRPC; give host and port, {right}")
    if not host or url.endswith("]"):
        raise InvalidRequest(f"{url!r} has no port; give host and port, {url.strip(':') or 'localhost'}:8001")
    if ":" in host and not re.fullmatch(r"\[[^][]+\]", host):
        raise InvalidRequest(f"{url!r} is no host and port; put an IPv6 address in brackets, [::1]:8001")
    if "/" in url or not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise InvalidRequest(f"{url!r} has no port from 1 to 65535; give that of Triton's gRPC, {host}:8001")
    return url


def leaves_machine(url: str) -> bool:
    """Whether what is sent to an endpoint, as `require_endpoint` takes it, goes further than the loopback interface."""
    if re.match(r"unix(-abstract)?:", url):
        return False
    target = re.sub(r"^(dns|ipv4|ipv6):(//[^/]*/|/)?", "", url)
    return not is_loopback(target.rpartition(":")[0])


def is_loopback(host: str) -> bool:
    """Whether a host, an IPv6 address with or without brackets, is this machine by its loopback interface."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    plain = getattr(address, "ipv4_mapped", None) or address
    return any(plain in network for network in LOOPBACK)


def netloc_of(origin: str) -> str:
    """Host and port of an Origin header; "" where it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:@/?#\[\]]+))(?::[0-9]*)?")


def is_served(listener: str, hosts: Sequence[str], allowed: Iterable[str] = ()) -> bool:
    """Whether what listens on `listener` answers a request with these Host headers.

    A page of anywhere can have its own name lead to 127.0.0.1, and the name stays in its requests. So on the loopback
    interface they have to come for that, or for an allowed name; off it for any, unless some are allowed.
    """
    allowed = {name.lower().strip("[]") for name in allowed}
    if not allowed and not is_loopback(listener):
        return True
    found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    name = (found[1] or found[2]).lower() if found else ""
    return is_loopback(name) or name in allowed
