"""OpenVINO's sessions against those of ONNX Runtime on the same export, and what goes wrong around them.

That its greedy tokens are those of transformers is in test_generate.py.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from bundles import TOKEN_BUDGET, WINDOW_BUDGET, build_mixed, build_openvino, write_export
from checkpoints import random_checkpoint

from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.bundle import Bundle
from cxr_triton.errors import BuildFailed, DeviceUnavailable, InvalidBundle, InvalidRequest
from cxr_triton.pixels import image

GRIDS = [(196, 168), (28, 28), (56, 336), (224, 224), (84, 28)]
BF16 = 2**-8  # relative distance of its values


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvino")
    random_checkpoint(folder / "checkpoint", tied=False)
    return folder / "checkpoint"


@pytest.fixture(scope="module", params=["fp32", "int4"])
def pair(request, checkpoint, tmp_path_factory):
    """The bundle of ONNX Runtime and OpenVINO's of one export, and its precision."""
    folder = tmp_path_factory.mktemp(request.param)
    export = write_export(folder / "export", checkpoint, precision=request.param)
    vision = "fp32" if request.param == "fp32" else "bf16"
    theirs = build_openvino(export, folder / "openvino", request.param, vision)
    return build_bundle(export, folder / "onnxruntime"), theirs, request.param


def pictures(seed=0):
    rng = np.random.default_rng(seed)
    return [
        image.windows(
            rng.integers(0, 256, (*size, 3), np.uint8), window_budget=WINDOW_BUDGET, token_budget=TOKEN_BUDGET
        )
        for size in GRIDS
    ]


def test_image_embeddings_are_those_of_onnxruntime(pair):
    inputs, (onnxruntime, openvino, precision) = pictures(), pair
    expected, actual = (each.open_vision(threads=1).encode(**image.stack(inputs)) for each in (onnxruntime, openvino))
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    for each, ours, theirs in zip(inputs, expected, actual, strict=True):
        rows = slice(each.tokens)
        error = np.abs(ours[rows] - theirs[rows]).max() / np.abs(ours[rows]).max()
        assert error <= (1e-4 if precision == "fp32" else 8 * BF16)


def with_fp32_activations(bundle, folder):
    """ONNX Runtime's bundle again, its int4 layers with activations in fp32."""
    import onnx

    shutil.copytree(bundle.path, folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(model, folder / "decoder.onnx")
    return replace(bundle, path=folder)


def served_logits(bundle):
    """Logits of four slots in prefill and steps, and the slots' lengths at the end: slots are moved and freed."""
    decoder = bundle.open_decoder(slots=4, threads=1)
    rng, found = np.random.default_rng(1), []
    embeddings = rng.standard_normal((12, decoder.hidden)).astype(np.float32)
    for slot, count in enumerate((70, 9, 130, 33)):
        ids, index = rng.integers(0, 256, count), np.full(count, -1)
        index[1:9] = np.arange(8)
        for piece in (slice(0, 5), slice(5, count)):
            logits = decoder.prefill(
                slot,
                ids[piece],
                index[piece],
                embeddings,
                np.tile(np.arange(count), (3, 1))[:, piece],
                is_last=piece.stop == count,
            )
        found.append(logits.copy())
    for rows in (4, 1, 3):
        found.append(decoder.step(np.arange(rows) + 20, decoder.lengths[:rows].copy()).copy())
    decoder.move(3, 0)
    decoder.free(3)
    decoder.free(2)  # the longest: the cache shrinks
    found.append(decoder.step(np.array([5, 6]), decoder.lengths[:2].copy()).copy())
    return found, decoder.lengths.copy()


def relative_error(actual, expected):
    return max(np.abs(a - e).max() / np.abs(e).max() for a, e in zip(actual, expected, strict=True))


def test_logits_are_those_of_onnxruntime_with_slots_in_use_moved_and_freed(pair, tmp_path):
    onnxruntime, openvino, precision = pair
    (expected, lengths), (actual, its_lengths) = served_logits(onnxruntime), served_logits(openvino)
    np.testing.assert_array_equal(its_lengths, lengths)
    if precision == "fp32":
        assert relative_error(actual, expected) <= 1e-4
        return
    # OpenVINO rounds activations to int8 where the CPU has VNNI, as ONNX Runtime does everywhere; there, a last bit
    # decides between two values now and then. Elsewhere it leaves them in fp32.
    exact, _ = served_logits(with_fp32_activations(onnxruntime, tmp_path / "exact"))
    assert relative_error(actual, expected) <= 0.03 or relative_error(actual, exact) <= 1e-4


def test_weights_are_stored_once_in_their_own_size(pair):
    """No dequantized copy of a layer: the files are about as large as ONNX Runtime's, the tower's half of them."""
    for name, shares in (("decoder", (0.95, 1.05)), ("vision", (0.95, 1.05) if pair[2] == "fp32" else (0.45, 0.6))):
        ours = (pair[0].path / f"{name}.onnx.data").stat().st_size
        theirs = (pair[1].path / f"{name}.bin").stat().st_size
        assert shares[0] <= theirs / ours <= shares[1]


def resident(file):
    """Bytes of a mapped file that this process holds, and how long the mapping is."""
    text = Path("/proc/self/smaps").read_text()
    sizes = re.findall(rf" {re.escape(str(file))}\nSize: +(\d+) kB(?:\n\w+: +\d+ kB)*?\nRss: +(\d+) kB", text)
    assert sizes, "OpenVINO maps no file any more"
    return tuple(1024 * sum(map(int, column)) for column in zip(*sizes, strict=True))[::-1]


def test_weights_that_were_packed_are_not_held_twice(pair):
    """Their file stays mapped; what was read of it to pack it is given back."""
    bundle = pair[1]
    decoder, vision = bundle.open_decoder(slots=1, threads=1), bundle.open_vision(threads=1)
    given = np.arange(8), np.full(8, -1), np.zeros((0, decoder.hidden), np.float32), np.tile(np.arange(8), (3, 1))
    first = decoder.prefill(0, *given, is_last=True).copy()
    decoder.step(np.array([5]), np.array([8]))
    vision.encode(**image.stack(pictures()[:1]))
    for name in ("decoder.bin", "vision.bin"):
        held, size = resident(bundle.path / name)
        assert held < size / 4, name
    decoder.free(0)
    np.testing.assert_array_equal(decoder.prefill(0, *given, is_last=True), first)


def test_the_bundle_says_what_runs_it(pair):
    bundle = Bundle.open(pair[1].path)
    assert (bundle.engine, bundle.vision_engine) == ("openvino", "openvino")
    assert bundle.vision_precision == ("fp32" if pair[2] == "fp32" else "bf16")
    assert bundle.manifest["versions"]["openvino"] == metadata.version("openvino")


def test_without_openvino_the_error_says_what_to_install(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DeviceUnavailable, match=r"\[openvino\]"):
        pair[1].open_vision()
    with pytest.raises(DeviceUnavailable, match=r"\[openvino\]"):
        pair[1].open_decoder(slots=1)


ANOTHER_THREAD_FREES_IT = """
import os, signal, threading
import numpy as np, openvino as ov
from openvino import opset8
from cxr_triton.engines.openvino.session import open_request
x = opset8.parameter([1, 4], np.float32, name="x")
ov.save_model(ov.Model([opset8.relu(x)], [x]), "relu.xml")
kept = [open_request(os.path.abspath("relu.xml"), 1, "fp32")]
assert list(kept[0].infer([np.ones((1, 4), np.float32)]).values())[0].sum() == 4
thread = threading.Thread(target=kept.clear)
thread.start()
thread.join()
signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
signal.raise_signal(signal.SIGINT)
"""


def test_signals_come_where_another_thread_frees_a_session(tmp_path):
    """OpenVINO's alternate signal stack goes with its Core, and the thread that made it would keep its address."""
    run = subprocess.run(
        [sys.executable, "-c", ANOTHER_THREAD_FREES_IT], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (0, "interrupted\n"), run.stderr


def test_an_older_openvino_than_the_builders_is_refused(pair, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "2025.0.0")
    with pytest.raises(InvalidBundle, match=r"built with openvino .*2025\.0\.0 is installed"):
        Bundle.open(pair[1].path, verify=False)


def test_a_damaged_graph_is_named(pair, tmp_path):
    damaged = replace(pair[1], path=tmp_path)
    (tmp_path / "decoder.bin").write_bytes(b"")
    (tmp_path / "decoder.xml").write_text((pair[1].path / "decoder.xml").read_text()[:5000])
    with pytest.raises(InvalidBundle, match=r"openvino cannot load decoder\.xml"):
        damaged.open_decoder(slots=1)


def test_a_graph_that_openvino_does_not_take_leaves_nothing(checkpoint, tmp_path):
    import onnx

    export = write_export(tmp_path / "export", checkpoint)
    model = onnx.load(export / "vision.onnx", load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "Unheard"
    onnx.save(model, export / "vision.onnx")
    with pytest.raises(BuildFailed, match=r"openvino does not take vision\.onnx.*Unheard"):
        build_openvino(export, tmp_path / "bundle")
    assert [item.name for item in tmp_path.iterdir()] == ["export"]


def test_batch_invariance_is_not_promised(pair):
    with pytest.raises(InvalidRequest, match="openvino has none"):
        pair[1].open_decoder(slots=2, batch_invariant=True)


def test_beside_onnxruntime_it_runs_all_but_the_steps_of_a_lone_stream(checkpoint, tmp_path):
    """Bit by bit, on one cache: what each of the two gives that holds the same rows."""
    export = write_export(tmp_path / "export", checkpoint, precision="int4")
    built = [build(export, tmp_path / build.__name__, "int4") for build in (build_mixed, build_openvino)]
    mixed, many, one = (
        each.open_decoder(slots=2, threads=1) for each in (*built, build_bundle(export, tmp_path / "o"))
    )
    rng = np.random.default_rng(2)
    none, nothing = np.full(40, -1), np.zeros((0, mixed.hidden), np.float32)

    def same_rows(session):
        for slot in range(2):
            session.free(slot)
            session.write_cache(slot, 0, mixed.read_cache(slot, 0, int(mixed.lengths[slot])))

    for slot in range(2):
        prompt = (slot, rng.integers(0, 256, 40), none, nothing, np.tile(np.arange(40), (3, 1)))
        np.testing.assert_array_equal(*(each.prefill(*prompt, is_last=True) for each in (mixed, many)))
    same_rows(one)
    for step in (5, 6):
        lone = np.array([step]), mixed.lengths[:1].copy()
        np.testing.assert_array_equal(*(each.step(*lone) for each in (mixed, one)))
    few = rng.integers(0, 256, (1, 3)), mixed.lengths[:1, None] + np.arange(3)
    np.testing.assert_array_equal(*(each.check(*few) for each in (mixed, one)))
    same_rows(many)
    assert mixed.checks == many.checks == 2
    ids, positions = rng.integers(0, 256, (2, 3)), mixed.lengths[:2, None] + np.arange(3)
    np.testing.assert_array_equal(*(each.check(ids, positions) for each in (mixed, many)))
    np.testing.assert_array_equal(*(each.read_cache(0, 0, 48) for each in (mixed, many)))
