"""vLLM itself as a baseline: its own server, tower and processor beside the served demonstration model."""

import io

import numpy as np
import pytest
from gateway_peers import PHANTOM, phantom_repository
from PIL import Image
from vllm_api import NONE, PYTHON, is_installed

from cxr_triton import phantom
from cxr_triton.engines.bundle import Bundle
from cxr_triton.perf import peers
from cxr_triton.perf.peers import vllm
from cxr_triton.triton_repo.package import BUNDLE
from cxr_triton.triton_repo.serve import Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # vLLM's start takes half a minute, and many on a machine that does much else
    pytest.mark.triton,
    pytest.mark.skipif(not is_installed(), reason=NONE),
]


class InFp32(vllm.Vllm):
    dtype = "float32"


def items() -> list:
    rng, pictures = np.random.default_rng(0), []
    for _ in range(2):
        out, drawn = io.BytesIO(), phantom.draw(rng)
        pixels = (drawn.stored >> drawn.bits_stored - 8).astype(np.uint8)
        Image.fromarray(pixels).resize((224, 196)).save(out, "PNG")  # whole patches: nobody has to resize it
        pictures.append(out.getvalue())
    return [([picture], {"max_new_tokens": 24, "temperature": 0.0}) for picture in pictures]


def test_in_fp32_it_says_what_the_served_model_says(tmp_path, monkeypatch):
    monkeypatch.setenv(vllm.PYTHON, PYTHON)
    monkeypatch.setenv(vllm.OPTIONS, "--enforce-eager --skip-mm-profiling --max-num-seqs 2")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(vllm, "PEER", InFp32)
    repository = phantom_repository(tmp_path)
    profile = Bundle.open(repository / BUNDLE, verify=False).profile
    with Server(repository, grpc_port=0, http_port=0, metrics_port=0) as server:
        (entry,) = peers.measure(server.grpc, items(), profile, {"vllm": PHANTOM / "checkpoint"}, rounds=2)
    assert entry["same_prompt_tokens"] and entry["same_output_tokens"] and entry["same_text"] == 1.0
    assert entry["versions"]["vllm-cpu"] and entry["versions"]["torch"]
    assert entry["ratio_time_to_first_token"] > 0 and entry["ratio_decode_tokens_per_s"] > 0
    assert entry["peak_resident_bytes"] > 1 << 28, "the server's processes count"
    assert len({each["theirs"]["text"] for each in entry["rounds"]}) == 2
