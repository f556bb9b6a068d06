"""What of vLLM is called here, as its sources declare it: `declared` reads a tree of them without importing anything.

`python tests/vllm_api.py FOLDER…` reads installed trees (each with `vllm/` and `vllm/_version.py`) and writes
`vllm_api.json`: for each name its declaration in the first version, and in each that changed it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

PYTHON = os.environ.get("CXR_VLLM_PYTHON") or str(Path(__file__).resolve().parents[1] / ".venv-vllm/bin/python")
"""Of an environment with vLLM, where there is one: `make vllm` makes it."""
NONE = "no vLLM at CXR_VLLM_PYTHON or in .venv-vllm; `make vllm` installs it"
RECORD = Path(__file__).with_name("vllm_api.json")
ENGINE = """model tokenizer skip_tokenizer_init dtype quantization kv_cache_dtype max_model_len max_num_seqs
max_num_batched_tokens gpu_memory_utilization kv_cache_memory_bytes enforce_eager seed enable_prefix_caching
enable_chunked_prefill limit_mm_per_prompt enable_mm_embeds skip_mm_profiling mm_processor_cache_gb mm_processor_kwargs
speculative_config structured_outputs_config enable_lora max_loras max_lora_rank disable_log_stats generation_config
compilation_config logits_processors"""
SAMPLING = """temperature top_p repetition_penalty seed max_tokens min_tokens stop_token_ids ignore_eos detokenize
output_kind structured_outputs logprobs extra_args"""
CHAT = """messages temperature repetition_penalty min_tokens max_completion_tokens stream stream_options ignore_eos
cache_salt return_token_ids"""
CALLED = {
    "vllm/v1/engine/async_llm.py": {"AsyncLLM": "from_engine_args generate abort shutdown errored"},
    "vllm/v1/engine/llm_engine.py": {
        "LLMEngine": "from_engine_args add_request add_lora step abort_request has_unfinished_requests "
        "reset_prefix_cache"
    },
    "vllm/v1/engine/exceptions.py": {"": "EngineDeadError EngineGenerateError"},
    "vllm/engine/arg_utils.py": {"EngineArgs": ENGINE, "AsyncEngineArgs": "enable_log_requests"},
    "vllm/sampling_params.py": {
        "SamplingParams": SAMPLING,
        "RequestOutputKind": "DELTA",
        "StructuredOutputsParams": "regex grammar json choice",
    },
    "vllm/v1/sample/logits_processor/__init__.py": {"AdapterLogitsProcessor": "new_req_logits_processor"},
    "vllm/v1/sample/logits_processor/interface.py": {"LogitsProcessor": "is_argmax_invariant validate_params"},
    "vllm/inputs/llm.py": {
        "TokensPrompt": "prompt_token_ids multi_modal_data multi_modal_uuids mm_processor_kwargs cache_salt"
    },
    "vllm/model_executor/models/qwen2_5_vl.py": {"Qwen2_5_VLImageEmbeddingInputs": "image_embeds image_grid_thw"},
    "vllm/outputs.py": {
        "RequestOutput": "request_id prompt_token_ids outputs finished num_cached_tokens",
        "CompletionOutput": "text token_ids finish_reason stop_reason logprobs",
    },
    "vllm/lora/request.py": {"LoRARequest": "lora_name lora_int_id lora_path"},
    "vllm/config/speculative.py": {
        "": "SpeculativeMethod",
        "SpeculativeConfig": "method num_speculative_tokens prompt_lookup_max prompt_lookup_min "
        "suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests",
    },
    "vllm/config/lora.py": {"": "MaxLoRARanks"},
    "vllm/config/cache.py": {"": "CacheDType"},
    "vllm/envs.py": {"": "VLLM_CPU_KVCACHE_SPACE VLLM_ENABLE_V1_MULTIPROCESSING VLLM_NO_USAGE_STATS"},
    "vllm/entrypoints/openai/chat_completion/protocol.py": {"ChatCompletionRequest": CHAT},
}
"""File: class, or "" for the module itself: the names in it that our rooms and the baseline use."""


def is_installed() -> bool:
    """Whether `PYTHON` has vLLM; one where its installation failed has none."""
    return has("vllm")


def has(module: str) -> bool:
    """Whether `PYTHON` has a module."""
    find = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    return Path(PYTHON).is_file() and subprocess.run([PYTHON, "-c", find], check=False).returncode == 0


def declared(root: Path) -> dict[str, str]:
    """``module.Class.name`` to its declaration, for every name of `CALLED`; empty text where there is none."""
    found = {}
    for file, classes in CALLED.items():
        path = root / file
        body = ast.parse(path.read_text("utf-8")).body if path.is_file() else []
        module = file.removesuffix(".py").replace("/", ".")
        for kind, names in classes.items():
            members = _members(_flat(body), kind) if kind else _named(_flat(body))
            for name in names.split():
                found[".".join(filter(None, (module, kind, name)))] = members.get(name, "")
    return found


def _flat(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a module, those under ``if`` and ``try`` too."""
    return [each for node in body for each in [node, *_flat(getattr(node, "body", []) if _is_block(node) else [])]]


def _is_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If | ast.Try)


def _members(body: list[ast.stmt], kind: str) -> dict[str, str]:
    """Of a class, its bases in the same file first."""
    node = next((each for each in body if isinstance(each, ast.ClassDef) and each.name == kind), None)
    if node is None:
        return {}
    members: dict[str, str] = {}
    for base in node.bases:
        members |= _members(body, base.id) if isinstance(base, ast.Name) else {}
    members |= _named(node.body)
    if init := next((each for each in node.body if getattr(each, "name", "") == "__init__"), None):
        of_self = [
            each for each in ast.walk(init) if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "self"
        ]
        given = {each.arg: each for each in [*init.args.args, *init.args.kwonlyargs]}
        for each in of_self:
            annotation = getattr(given.get(each.attr), "annotation", None)
            members.setdefault(each.attr, ast.unparse(annotation) if annotation else "attribute")
    return members


def _named(body: list[ast.stmt]) -> dict[str, str]:
    named = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            named[node.target.id] = ast.unparse(node.annotation) + (
                f" = {ast.unparse(node.value)}" if node.value else ""
            )
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named[node.targets[0].id] = ast.unparse(node.value)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            named[node.name] = f"({ast.unparse(node.args)})"
        elif isinstance(node, ast.ClassDef):
            named[node.name] = "class"
    return named


def recorded(version: str) -> dict[str, str]:
    """What `declared` gave of a version, or of the last recorded one before it."""
    record, at = json.loads(RECORD.read_text()), numbers(version)
    return {
        name: [text for first, text in changes.items() if numbers(first) <= at][-1]
        for name, changes in record["names"].items()
    }


def numbers(version: str) -> tuple[int, ...]:
    """Of a version, for comparing."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def main(folders: list[str]) -> None:
    """Write `RECORD` from source trees."""
    trees = {}
    for folder in folders:
        said = re.search(r"__version__ = version = ['\"]([^'\"+]+)", (Path(folder) / "vllm/_version.py").read_text())
        trees[said[1]] = declared(Path(folder))
    versions = sorted(trees, key=numbers)
    names: dict[str, dict[str, str]] = {}
    for version in versions:
        for name, text in trees[version].items():
            changes = names.setdefault(name, {})
            if not changes or list(changes.values())[-1] != text:
                changes[version] = text
    RECORD.write_text(json.dumps({"versions": versions, "names": names}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
