"""The front door of deploy/front, run on loopback: nginx, the token service, certificates."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port

FRONT = Path(__file__).resolve().parents[1] / "deploy" / "front"


def nginx() -> str:
    """The program; skips without it."""
    found = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if found is None:
        pytest.skip("no nginx here; install nginx-light")
    return found


class Authority:
    """An authority in a folder, and what it signs."""

    def __init__(self, folder: Path, name: str = "ca"):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.cert, self._key = folder, folder / f"{name}.crt", folder / f"{name}.key"
        _openssl("req", "-x509", *EC, "-subj", f"/CN={name}", "-days", "2", "-keyout", self._key, "-out", self.cert)

    def sign(self, name: str, *, days: int = 2) -> tuple[Path, Path]:
        """Certificate and key of a host or a client; one of minus one day has ended."""
        cert, key, request = (self.folder / f"{name}.{kind}" for kind in ("crt", "key", "csr"))
        names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        _openssl("req", *EC, *names, "-keyout", key, "-out", request)
        signed = ["-CA", self.cert, "-CAkey", self._key, "-CAcreateserial", "-copy_extensions", "copy"]
        _openssl("x509", "-req", "-in", request, *signed, "-days", days, "-out", cert)
        return cert, key


EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*words) -> None:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class FrontDoor:
    """nginx before servers, until the `with` block ends.

    Parameters
    ----------
    folder : path
        Takes configuration, certificates, state and logs.
    servers : sequence of str
        ``HOST:PORT`` of each.
    auth : {"token", "mtls", "both"}
    conf : path
        Where its nginx.conf is from.
    limits : dict
        Directives of limits.conf with another value.

    Attributes
    ----------
    url : str
        Where it listens, by the name that its certificate is for.
    ca : Authority
        Of the door and of its clients.
    """

    def __init__(
        self, folder: Path, servers, *, auth: str = "token", limits: dict[str, str] | None = None, conf: Path = FRONT
    ):
        self.folder, self._nginx = folder, nginx()
        self.conf, self.state = folder / "conf", folder / "state"
        for made in (self.conf / "tls", self.state):
            made.mkdir(parents=True)
        for name in ("nginx.conf", "limits.conf"):
            shutil.copy(conf / name, self.conf)
        text = (self.conf / "limits.conf").read_text()
        for directive, value in (limits or {}).items():
            lines = text.splitlines()
            [at] = [number for number, line in enumerate(lines) if line.startswith(f"{directive} ")]
            lines[at] = f"{directive} {value};"
            text = "\n".join(lines) + "\n"
        (self.conf / "limits.conf").write_text(text)
        shutil.copy(FRONT / f"auth-{auth}.conf", self.conf / "auth.conf")
        port = free_port()
        self.url = f"localhost:{port}"
        (self.conf / "listen.conf").write_text(f"listen 127.0.0.1:{port} ssl http2;\n")
        self.tokens, self.token_file = self.conf / "tokens", folder / "token"
        self._socket = Path(f"/tmp/cxr-front-{port}.sock")  # a socket's path is short
        (self.conf / "tokens.conf").write_text(f"server unix:{self._socket};\n")
        self.upstream(servers)
        self.ca = Authority(folder / "ca")
        for made, name in zip(self.ca.sign("localhost"), ("tls.crt", "tls.key"), strict=True):
            shutil.copy(made, self.conf / "tls" / name)
        shutil.copy(self.ca.cert, self.conf / "tls" / "ca.crt")
        self.token = self.add_token("test")
        self.token_file.write_text(self.token)
        self._processes: list[subprocess.Popen] = []

    def upstream(self, servers) -> None:
        lines = [f"server {server} max_fails=1 fail_timeout=2s;\n" for server in servers]
        (self.conf / "upstream.conf").write_text("".join(lines))

    def add_token(self, name: str, *more: str) -> str:
        command = [sys.executable, "-S", FRONT / "tokens.py", "add", self.tokens, name, *more]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def __enter__(self) -> FrontDoor:
        self._log = (self.folder / "access.log").open("wb")
        self._errors = (self.folder / "error.log").open("wb")
        judge = [sys.executable, "-S", FRONT / "tokens.py", "serve", self.tokens, "--socket", self._socket]
        user = "daemon off;" + " user root;" * (os.geteuid() == 0)  # else workers of root's are of another user
        door = [self._nginx, "-p", f"{self.state}/", "-c", self.conf / "nginx.conf", "-g", user]
        for command in (judge, door):
            self._processes.append(subprocess.Popen(command, stdout=self._log, stderr=self._errors))
        port, deadline = int(self.url.rpartition(":")[2]), time.monotonic() + 60
        while not (self._socket.exists() and _listens(port)):
            assert time.monotonic() < deadline and self._processes[1].poll() is None, self.errors()
            time.sleep(0.02)
        return self

    def __exit__(self, *exc) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            process.wait(60)
        self._log.close()
        self._errors.close()
        self._socket.unlink(missing_ok=True)

    @property
    def pids(self) -> list[int]:
        """Of the token service and of nginx's master."""
        return [process.pid for process in self._processes]

    def reload(self) -> None:
        """Take configuration and certificates anew; what is under way goes on."""
        self._processes[1].send_signal(signal.SIGHUP)

    def log(self) -> list[dict]:
        """The access log."""
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]

    def errors(self) -> str:
        return (self.folder / "error.log").read_text()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
