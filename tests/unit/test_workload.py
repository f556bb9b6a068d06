"""Workloads: what is drawn, refused and sent."""

import base64
import itertools
import json
import math

import numpy as np
import PIL.Image
import pytest
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from cxr_triton import phantom
from cxr_triton.errors import InvalidImage, InvalidRequest
from cxr_triton.perf import workload
from cxr_triton.perf.workload import Output, arrivals, input_data, load_spec, load_workload
from cxr_triton.pixels import dicom
from cxr_triton.profile import load_profile
from cxr_triton.request import ReadRequest

MINE = """\
name: mine
version: 3
description: A test's.
seed: 5
count: 6
images: {phantoms: 3, sizes: [64x48, 80x96], syntaxes: [jpeg_ls, explicit, rle], bits_stored: [12, 14]}
requests:
  - {task: findings, weight: 2, output: {median: 100, p95: 200, max: 220}}
  - {prompt: Compare., images: 2}
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return path


def test_a_workload_is_the_same_bytes_each_time(mine):
    first, again = load_workload(mine), load_workload(mine)
    assert [item.message("cxr_reader") for item in first.items] == [item.message("cxr_reader") for item in again.items]
    assert first.digest == again.digest
    mine.write_text(MINE.replace("seed: 5", "seed: 6"))
    assert load_workload(mine).digest != first.digest


def test_images_have_the_sizes_depths_and_syntaxes_asked_for(mine):
    drawn = {image.name: image for item in load_workload(mine).items for image in item.images}
    read = [dicom.read_image(drawn[name].data) for name in sorted(drawn)]
    assert [image.stored.shape for image in read] == [(64, 48), (80, 96), (64, 48)]
    assert [image.metadata.bits_stored for image in read] == [12, 14, 12]
    assert [drawn[name].facts["syntax"] for name in sorted(drawn)] == ["jpeg_ls", "explicit", "rle"]
    assert all(int(image.stored.max()) < 2**image.metadata.bits_stored for image in read)


def test_requests_follow_weights_lengths_and_images(mine):
    items = load_workload(mine).items
    asked = [item.request for item in items]
    assert sum("task" in request for request in asked) == 4 and sum("prompt" in request for request in asked) == 2
    assert all(len(item.images) == (2 if "prompt" in item.request else 1) for item in items)
    assert all(("max_new_tokens" in request) == ("task" in request) for request in asked)
    assert len({json.dumps(request, sort_keys=True) for request in asked}) == len(asked)  # told apart by their seeds


def test_enlarging_keeps_the_picture():
    drawn = phantom.draw(np.random.default_rng(3))
    rows, columns = drawn.stored.shape
    large = workload.enlarge(drawn, 4 * rows, 4 * columns, 12, np.random.default_rng(0))
    small = large.stored.reshape(rows, 4, columns, 4).mean((1, 3)) / 4095
    assert np.corrcoef(small.ravel(), drawn.stored.ravel())[0, 1] > 0.98
    assert large.bits_stored == 12 and (drawn.window is None) == (large.window is None)


def test_output_lengths_have_the_median_and_tail_asked_for():
    rng = np.random.default_rng(0)
    lengths = [Output(median=243, p95=290, max=309).draw(rng) for _ in range(4000)]
    assert np.median(lengths) == pytest.approx(243, rel=0.01)
    assert np.percentile(lengths, 95) == pytest.approx(290, rel=0.02)
    assert max(lengths) == 309
    assert {Output(median=48, p95=48, max=48).draw(rng) for _ in range(9)} == {48}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("phantoms: 3", "phantom: 3", "did you mean 'phantoms'"),
        ("phantoms: 3", "phantoms: 0", "outside 1 to 1000"),
        ("64x48", "64x", "ROWSxCOLUMNS"),
        ("jpeg_ls", "jpegls", "did you mean 'jpeg_ls'"),
        ("p95: 200", "p95: 20", "have to ascend"),
        ("version: 3", "", "version: is missing"),
        ("count: 6", "arrival: burst", "none of poisson, constant"),
        ("images: 2}", "images: two}", "images"),
    ],
)
def test_a_wrong_workload_is_refused(mine, old, new, said):
    mine.write_text(MINE.replace(old, new, 1))
    with pytest.raises(InvalidRequest, match=said):
        load_workload(mine)


def test_names_that_are_none_are_refused(tmp_path):
    with pytest.raises(InvalidRequest, match="did you mean 'phantom'"):
        load_spec("phantoms")
    with pytest.raises(InvalidRequest, match="no workload file"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(InvalidRequest, match="has no files"):
        load_workload("phantom", images=tmp_path)


def test_a_folder_of_images_is_used_without_its_names(mine, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    drawn = {image.name: image.data for item in load_workload(mine).items for image in item.images}
    (folder / "DOE^JANE.dcm").write_bytes(drawn["phantom-1"])
    PIL.Image.new("L", (30, 40)).save(folder / "A.png")
    used = load_workload("phantom", images=folder)
    first, second = used.items[0].images[0], used.items[1].images[0]
    assert first.facts == {"syntax": "png", "rows": 40, "columns": 30, "bits_stored": 8}
    assert second.data == drawn["phantom-1"]
    assert second.facts == {"syntax": "explicit", "rows": 80, "columns": 96, "bits_stored": 14}
    assert "DOE" not in json.dumps(used.as_json()) and len(used.items) == 20
    (folder / "notes.txt").write_text("no picture")
    with pytest.raises(InvalidImage, match=r"notes\.txt"):
        load_workload("phantom", images=folder)


@pytest.mark.parametrize(
    ("name", "profile"),
    [("nv-reason", "nv-reason-cxr-3b"), ("chexone", "chexone"), ("short", "nv-reason-cxr-3b"), ("short", "chexone")],
)
def test_bundled_workloads_ask_what_the_models_know(name, profile):
    spec, known = load_spec(name)[0], load_profile(profile)
    assert spec.name == name
    pool = [workload.Image("x", b"")] * 4
    for item in workload._items(spec, pool):
        asked = ReadRequest.from_json(json.dumps(item.request), known)
        assert asked.max_new_tokens == item.request["max_new_tokens"]
        assert asked.min_images <= len(item.images) <= asked.max_images


def test_every_bundled_workload_is_valid():
    assert {load_spec(name)[0].name for name in workload.workload_names()} == set(workload.workload_names())


def test_input_data_is_length_prefixed_bytes_in_base64(mine):
    """The bytes under b64 are the serialized tensor, which perf_analyzer sends as they are."""
    items = load_workload(mine).items
    for item, step in zip(items, input_data(items)["data"], strict=True):
        images = base64.b64decode(step["IMAGES"]["content"]["b64"])
        assert images == serialize_byte_tensor(np.array([image.data for image in item.images], object)).item()
        assert step["IMAGES"]["shape"] == [len(item.images)]
        (request,) = deserialize_bytes_tensor(base64.b64decode(step["REQUEST"]["content"]["b64"]))
        assert json.loads(request) == item.request


def test_arrivals():
    assert list(itertools.islice(arrivals("constant", 4.0, [0]), 4)) == [0.0, 0.25, 0.5, 0.75]
    times = np.array(list(itertools.islice(arrivals("poisson", 20.0, [1]), 4001)))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05) and gaps.std() == pytest.approx(1 / 20, rel=0.08)
    # Exponential gaps: the share over the mean is 1 / e.
    assert (gaps > 1 / 20).mean() == pytest.approx(1 / math.e, abs=0.03)
    assert list(itertools.islice(arrivals("poisson", 20.0, [1]), 4001)) == list(times)
