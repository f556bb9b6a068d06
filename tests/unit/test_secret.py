"""The seal of a server's models, what a guarded server is started with, and a batch that a stranger shares."""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from cxr_triton.engines import secret
from cxr_triton.engines.pictures import PictureCache
from cxr_triton.engines.secret import SECRET, Seal
from cxr_triton.engines.session import VisionSession
from cxr_triton.errors import InvalidConfig, InvalidRequest
from cxr_triton.triton_repo.guard import guarded, statistics_header

ROOT = Path(__file__).resolve().parents[2]
KEY = "k" * 64
IDS = np.arange(6)


def test_a_seal_opens_with_all_that_it_was_closed_over():
    sealed = Seal("CONTEXT", KEY).close("é {}", IDS, IDS.reshape(2, 3))
    assert Seal("CONTEXT", KEY).open(sealed, IDS, IDS.reshape(2, 3)) == "é {}"
    for seal, text, arrays in (
        (Seal("COMPLETION", KEY), sealed, (IDS, IDS.reshape(2, 3))),
        (Seal("CONTEXT", KEY[1:]), sealed, (IDS, IDS.reshape(2, 3))),
        (Seal("CONTEXT", KEY), sealed, (IDS, IDS.reshape(3, 2))),
        (Seal("CONTEXT", KEY), sealed, (IDS.astype(np.int32), IDS.reshape(2, 3))),
        (Seal("CONTEXT", KEY), sealed, (np.concatenate([IDS, IDS]),)),
        (Seal("CONTEXT", KEY), sealed, ()),
        (Seal("CONTEXT", KEY), sealed + " ", (IDS, IDS.reshape(2, 3))),
        (Seal("CONTEXT", KEY), "1" + sealed[1:], (IDS, IDS.reshape(2, 3))),
        (Seal("CONTEXT", KEY), "", ()),
    ):
        with pytest.raises(InvalidRequest, match="are not as a model of this server wrote them; call the ensemble"):
            seal.open(text, *arrays)


def test_a_seal_opens_once_and_in_time(monkeypatch):
    ours, theirs = Seal("CONTEXT", KEY), Seal("CONTEXT", KEY)
    first, second = ours.close("{}"), ours.close("{}")
    assert first != second
    for sealed in (first, second):
        assert theirs.open_once(sealed) == "{}"
        with pytest.raises(InvalidRequest, match="CONTEXT was used before or is too old"):
            theirs.open_once(sealed)
    late, now_ns = ours.close("{}"), time.monotonic_ns()
    monkeypatch.setattr(secret.time, "monotonic_ns", lambda: now_ns + int(1.001e9 * secret.MAX_AGE_S))
    for sealed in (first, late):
        with pytest.raises(InvalidRequest, match="too old"):
            theirs.open_once(sealed)
    assert theirs.open_once(ours.close("{}")) == "{}"
    assert len(theirs._used) == 1, "what cannot be used again is remembered for ever"


def test_no_model_starts_without_a_secret_or_with_a_short_one(monkeypatch):
    monkeypatch.delenv(SECRET, raising=False)
    with pytest.raises(InvalidConfig, match="cxr-triton serve"):
        Seal("CONTEXT")
    monkeypatch.setenv(SECRET, "short")
    for start in (lambda: Seal("CONTEXT"), lambda: guarded({SECRET: "short"})):
        with pytest.raises(InvalidConfig, match="5 characters, must have at least 32"):
            start()


def test_every_server_has_a_secret_of_its_own_that_no_flag_tells():
    (one, flags), (other, _) = guarded({"A": "1", "AIP_MODE": "PREDICTION"}), guarded({})
    assert one[SECRET] != other[SECRET] and one.keys() == {"A", SECRET}
    assert one[SECRET] not in "".join(flags)
    assert statistics_header(one[SECRET])[1] in flags[1] and statistics_header(other[SECRET])[1] not in flags[1]
    assert guarded({SECRET: KEY})[0][SECRET] == KEY


class Vision(VisionSession):
    """Gives each image the number in its first window."""

    def _run(self, feeds):
        return feeds["pixel_windows"][:, 0, 0, :1, None].astype(np.float32)


class Tensor:
    def __init__(self, name, value):
        self.name, self.value = name, value

    def as_numpy(self):
        return self.value


@pytest.fixture
def encoder(monkeypatch):
    backend = ModuleType("triton_python_backend_utils")
    backend.Tensor = Tensor
    backend.TritonError = str
    backend.InferenceResponse = lambda tensors=(), error=None: error or tensors[0].value
    backend.get_input_tensor_by_name = lambda request, name: Tensor(name, request[name])
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    monkeypatch.delitem(sys.modules, "cxr_triton.triton_repo.adapter", raising=False)
    spec = importlib.util.spec_from_file_location("served_vision", ROOT / "triton_repo/vision_encoder/1/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.session = PictureCache(Vision(), 1 << 20)
    counter = SimpleNamespace(increment=lambda by: None)
    model.metrics = {"pictures_total": counter, "picture_hits_total": counter}
    yield model
    sys.modules.pop("cxr_triton.triton_repo.adapter", None)


class Request(dict):
    """Tensors by their names."""

    def request_id(self):
        return ""


def patches(number: int, order: int = 0, valid: bool = True) -> Request:
    """The tensors of one image of one window, of two that there may be, and one token."""
    return Request(
        PIXEL_WINDOWS=np.full((1, 2, 64, 588), number, np.uint8),
        PATCH_ROWS_COLS=np.zeros((1, 2, 64, 2), np.int32),
        VALID=np.array([[[valid] * 64, [False] * 64]]),
        MERGE_ORDER=np.full((1, 1), order, np.int32),
    )


@pytest.mark.parametrize("bad", [{"order": 16}, {"order": -1}, {"valid": False}], ids=str)
def test_what_points_out_of_its_image_fails_alone_in_its_batch(encoder, bad):
    one, wrong, other = encoder.execute([patches(7), patches(8, **bad), patches(9)])
    assert (one.item(), other.item()) == (7, 9)
    assert wrong.startswith("[INVALID_REQUEST] MERGE_ORDER must stay within 0 and 15")
