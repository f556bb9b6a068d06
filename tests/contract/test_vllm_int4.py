"""vLLM on the int4 checkpoint that an export makes of modelopt's: its probabilities beside those of transformers."""

import json
import os
import subprocess

import pytest
import torch
from int4_checkpoint import write_int4
from vllm_room import CHECKPOINT, vllm_python  # noqa: F401

from cxr_triton.engines.vllm.layout import interpreter
from cxr_triton.export.checkpoint import Checkpoint, torch_model
from cxr_triton.export.folder import write_folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_python")]
ASK = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=256, max_num_seqs=1, enforce_eager=True,
              skip_mm_profiling=True, limit_mm_per_prompt={"image": 0, "video": 0})
    ids = json.loads(sys.argv[2])
    (out,) = llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    told = [found[each].logprob for each, found in zip(ids[1:], out.prompt_logprobs[1:])]
    print("\\nlogprobs", json.dumps(told))
"""
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}


def test_int4_of_modelopt_is_what_vllm_computes_with(tmp_path):
    effective = write_int4(CHECKPOINT, tmp_path / "modelopt")
    write_folder(Checkpoint(tmp_path / "modelopt"), tmp_path / "packed", progress=False)
    ids = torch.randint(10, 640, (1, 64), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = 3
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    command = [interpreter(), str(script), str(tmp_path / "packed"), json.dumps(ids[0].tolist())]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert "logprobs" in done.stdout, (done.stdout + done.stderr)[-3000:]
    theirs = torch.tensor(json.loads(done.stdout.rpartition("logprobs")[2]))

    model = torch_model(CHECKPOINT, torch.float32)
    model.load_state_dict({_of_model(name): each.float() for name, each in effective.items()}, strict=False)
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        plain = torch_model(CHECKPOINT, torch.float32)(input_ids=ids).logits[0, :-1].log_softmax(-1)
    ours, unquantized = (each.gather(1, ids[0, 1:, None])[:, 0] for each in (logprobs, plain))
    error, rounding = (theirs - ours).abs().mean(), (unquantized - ours).abs().mean()
    assert error < 0.1 * rounding, (error, rounding)


def _of_model(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"
