"""axe-core, which finds what keeps people from using a page: where `make axe` fetched it, run in a tab of Chromium."""

import hashlib
import re
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKE = dict(re.findall(r"^(AXE\w*) := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
PACKAGE = ROOT / MAKE["AXE"]


def lacks(package: Path = PACKAGE) -> str:
    """Why it cannot be run; nothing where it can."""
    if not package.exists():
        return "no axe-core; make axe"
    if hashlib.sha512(package.read_bytes()).hexdigest() != MAKE["AXE_SHA512"]:
        return f"{package.name} is damaged; make axe"
    return ""


needs_axe = pytest.mark.skipif(bool(lacks()), reason=lacks())
SCHEMES = ("light", "dark")
BARRIERS = """axe.run(document, { resultTypes: ["violations"] }).then(({ violations }) => violations
  .filter(({ impact }) => impact === "serious" || impact === "critical")
  .map(({ id, nodes }) => [id, ...nodes.map(({ html, any }) => `${html.slice(0, 160)} ${any[0]?.message ?? ""}`)]))
"""


def source() -> str:
    """Its script."""
    with tarfile.open(PACKAGE) as package:
        return package.extractfile("package/axe.min.js").read().decode()


async def barriers(page, schemes=SCHEMES) -> dict[str, list[list[str]]]:
    """The serious and critical violations of what a tab shows, by the colours that its visitor prefers."""
    if not await page.evaluate("'axe' in window"):
        await page.evaluate(f"{source()}; null")
    found = {}
    for scheme in schemes:
        await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        found[scheme] = await page.evaluate(BARRIERS)
    await page.call("Emulation.setEmulatedMedia", features=[])
    return {scheme: told for scheme, told in found.items() if told}
