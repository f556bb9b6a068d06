"""What the tests of vLLM share: its Python, and bundles of the demonstration model for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from vllm_api import NONE, PYTHON, is_installed

from cxr_triton.engines.vllm.layout import INTERPRETER

PHANTOM = Path(__file__).resolve().parent / "phantom"
CHECKPOINT = PHANTOM / "checkpoint"


@pytest.fixture(scope="module")
def vllm_python():
    """The Python that has vLLM, named in the environment; tests that need it are skipped without one."""
    if not is_installed():
        pytest.skip(NONE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(INTERPRETER, PYTHON)
        yield


def build(folder: Path, precision: str, checkpoint: Path = CHECKPOINT, *, profile=None, adapter: Path | None = None):
    """A vLLM bundle of the demonstration model, beside a tower in fp32, and of an adapter that its profile names."""
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.engines.recipe import load_recipe
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.profile import load_profile

    profile, export = profile or load_profile(PHANTOM / "profile.yaml"), folder / "export"
    options = {"precision": precision, "compute": "fp32", "form": "checkpoint", "adapter": adapter}
    export_checkpoint(str(checkpoint), export, profile, accept_licence=True, progress=False, **options)
    recipe = load_recipe("cpu-bf16-vllm")
    kv = precision if precision in ("fp32", "bf16") else "bf16"
    decoder = dataclasses.replace(recipe.decoder, precision=precision, kv=kv)
    return build_bundle(export, folder / "bundle", recipe=dataclasses.replace(recipe, decoder=decoder, thresholds={}))
