"""Baselines beside the served ensemble: same prompts, same numbers of tokens, ratios of rounds in turn."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cxr_triton import phantom
from cxr_triton.engines.bundle import Bundle
from cxr_triton.errors import InvalidRequest
from cxr_triton.perf import peers
from cxr_triton.perf.peers import genai, vllm
from cxr_triton.perf.peers.peer import Peer

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def items() -> list:
    rng, requests = np.random.default_rng(0), [{"max_new_tokens": 12}, {"max_new_tokens": 9}]
    pictures = []
    for size in ((200, 160), (300, 200)):
        out = io.BytesIO()
        drawn = phantom.draw(rng)
        Image.fromarray((drawn.stored >> drawn.bits_stored - 8).astype(np.uint8)).resize(size).save(out, "PNG")
        pictures.append(out.getvalue())
    return [([picture], request) for picture, request in zip(pictures, requests, strict=True)]


def test_transformers_gets_the_same_prompts_and_writes_as_many_tokens(server, served_bundle, items):
    profile, rounds = Bundle.open(served_bundle, verify=False).profile, []
    asked = {"transformers": served_bundle.parent / "checkpoint"}
    (entry,) = peers.measure(server.grpc, items, profile, asked, rounds=2, on_round=rounds.append)
    assert rounds == ["start transformers", "baselines, warm-up", "baselines, round 1", "baselines, round 2"]
    assert entry["name"] == "transformers.generate" and entry["scope"] == "reading"
    assert entry["same_prompt_tokens"] and entry["same_output_tokens"]
    assert [each["item"] for each in entry["rounds"]] == [1, 0]
    for each in entry["rounds"]:
        ours, theirs = each["ours"], each["theirs"]
        assert theirs["tokens"] == ours["tokens"] <= items[each["item"]][1]["max_new_tokens"]
        assert 0 < theirs["first_s"] < theirs["seconds"] and 0 < ours["first_s"] < ours["seconds"]
    ratios = [
        each["ours"]["tokens"] / each["ours"]["seconds"] * each["theirs"]["seconds"] / each["theirs"]["tokens"]
        for each in entry["rounds"]
    ]
    assert entry["ratio_output_tokens_per_s"] == pytest.approx(np.median(ratios))
    assert entry["ratio_time_to_first_token"] > 0 and entry["peak_resident_bytes"] > 1 << 26


def test_genai_decodes_prompts_of_the_same_lengths(server, served_bundle, items, monkeypatch):
    """onnxruntime-genai's builder takes the 3B's sizes, not a model this small: its place is taken by a double."""
    monkeypatch.setattr(genai, "PEER", EchoDecoder)
    folder = served_bundle.parent / "genai"
    folder.mkdir(exist_ok=True)
    (folder / "genai_config.json").write_text("{}")
    profile = Bundle.open(served_bundle, verify=False).profile
    (entry,) = peers.measure(server.grpc, items, profile, {"genai": folder}, rounds=1)
    (each,) = entry["rounds"]
    assert entry["scope"] == "decoder" and entry["same_prompt_tokens"] and entry["same_output_tokens"]
    ours = each["ours"]["tokens"] / each["ours"]["decoder_s"]
    assert entry["ratio_output_tokens_per_s"] == pytest.approx(ours / (each["theirs"]["tokens"] / 2.0))
    assert entry["ratio_time_to_first_token"] is None


class EchoDecoder(Peer):
    """Says that it took half a second for the prompt, and two seconds in all."""

    title, packages, scope, elsewhere = "echo", ("numpy",), "decoder", True

    def __init__(self, folder: str):
        pass

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        return {"prompt_tokens": prompt_tokens, "tokens": tokens, "first_s": 0.5, "seconds": 2.0}


def test_what_is_not_installed_says_so(server, served_bundle, items, monkeypatch):
    monkeypatch.setenv(vllm.PYTHON, "/no/such/python")
    profile = Bundle.open(served_bundle, verify=False).profile
    (entry,) = peers.measure(server.grpc, items, profile, {"vllm": served_bundle}, rounds=1)
    why = "CXR_VLLM_PYTHON is /no/such/python, which has no vLLM; deploy/vllm-cpu.sh makes an environment with it"
    assert entry == {"name": "vLLM", "ratio_output_tokens_per_s": None, "why": why}


def test_baselines_are_named_with_a_checkpoint(served_bundle, tmp_path):
    folder = served_bundle.parent / "checkpoint"
    assert peers.parse([f"transformers={folder}"]) == {"transformers": folder}
    with pytest.raises(InvalidRequest, match="transformers"):
        peers.parse([f"transformer={folder}"])
    with pytest.raises(InvalidRequest, match="no checkpoint folder"):
        peers.parse([f"transformers={tmp_path}"])


def test_an_engine_whose_process_dies_is_an_error_not_a_wait(tmp_path):
    from cxr_triton.errors import InternalError
    from cxr_triton.perf.process import Process

    process = Process(Suicidal, [0])
    with pytest.raises(InternalError, match="ended with 7"):
        process.call("read")
    with pytest.raises(ValueError, match="no"):
        Process(Failing, [0])
    shutil.rmtree(tmp_path)


class Suicidal:
    def read(self):
        import os

        os._exit(7)


class Failing:
    def __init__(self):
        raise ValueError("no", json.dumps({}))
