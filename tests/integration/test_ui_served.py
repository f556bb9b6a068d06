"""The reading room in front of the demonstration model on the real served ensemble: many visitors, stops, exports."""

from pathlib import Path

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("highdicom")

from ui_server import UiServer

from cxr_triton import phantom, phantom_file
from cxr_triton.profile import load_profile

pytestmark = pytest.mark.triton
PHANTOM = Path(__file__).resolve().parents[1] / "phantom"
VISITORS = 16


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    """A warm server of the demonstration model."""
    pytest.importorskip("pytriton")
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    folder = tmp_path_factory.mktemp("ui")
    profile = load_profile(PHANTOM / "profile.yaml")
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", profile, precision="int4", progress=False)
    bundle = build_bundle(folder / "export", folder / "bundle")
    write_repository(bundle.path, folder / "repository", Settings(threads=1), unverified=True)
    with Server(folder / "repository", grpc_port=0, metrics_port=0, http_port=0, ready_timeout_s=120) as server:
        yield server


@pytest.fixture(scope="module")
def room(triton):
    with UiServer(triton.grpc) as server:
        yield server


def radiograph(seed: int) -> bytes:
    return phantom_file.write_dicom(phantom.draw(seed), syntax=list(phantom_file.SYNTAXES)[0])
