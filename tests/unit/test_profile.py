"""Profiles: what ships, what a user's own file may say, and how mistakes are named."""

import dataclasses
import math
import subprocess
import sys

import pytest

from cxr_triton.errors import InvalidProfile, UnsupportedCheckpoint
from cxr_triton.profile import eos_token_ids, grids, load_profile, profile_names

MINIMAL = """
extends: nv-reason-cxr-3b
name: mine
"""


def smart_resize(height, width, low, high):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rows, columns = smart_resize(height, width, 28, low, high)
    return min(rows, columns) // 28, max(rows, columns) // 28


def windows(grid):
    return math.ceil(grid[0] / 4) * math.ceil(grid[1] / 4)


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        (tmp_path / name).write_text(text, "utf-8")
        return tmp_path / name

    return write


def test_prompts_are_verbatim():
    nv, cx = load_profile("nv-reason-cxr-3b"), load_profile("chexone")
    assert nv.tasks[nv.default_task].prompt == "Find abnormalities and support devices."
    assert [nv.tasks[name].prompt for name in nv.follow_ups] == ["Provide differentials", "Write a structured report"]
    assert cx.tasks[cx.default_task].prompt == "Write an example findings section for the CXR."
    assert cx.modes["reasoning"].suffix == (
        r" Please reason step by step, and put your final answer within \boxed{{}}."
    )
    assert cx.modes["instruct"].suffix == ""
    assert (nv.system_prompt, cx.system_prompt) == (None, "You are a helpful assistant.")
    assert cx.tasks["temporal_classification"].prompt == (
        "You are given two images: one reference image and one new image. "
        "Please identify the progression of {disease}:\n{options}"
    )
    assert cx.tasks["temporal_classification"].placeholders == ("disease", "options")
    assert (len(nv.labels), nv.max_pixels, cx.max_pixels) == (14, 476**2, 512**2)


@pytest.mark.parametrize("name", profile_names())
def test_every_bundled_profile_warns_and_is_non_commercial(name):
    profile = load_profile(name)
    assert profile.licence.non_commercial
    assert "research" in profile.notice and "not for diagnosis" in profile.notice
    for task in profile.tasks.values():
        assert task.prompt == task.prompt.strip() and "  " not in task.prompt


@pytest.mark.parametrize(("name", "tokens", "budget"), [("nv-reason-cxr-3b", 289, 25), ("chexone", 333, 30)])
def test_budgets_are_those_of_the_largest_grid_that_the_reference_resize_gives(name, tokens, budget):
    profile = load_profile(name)
    seen = {
        smart_resize(height, width, profile.min_pixels, profile.max_pixels)
        for height in range(28, 600, 3)
        for width in range(height, 4 * height + 1, 3 if height < 320 else 17)
    }
    assert profile.token_budget == max(r * c for r, c in seen) == tokens
    assert profile.window_budget == max(map(windows, seen)) == budget


@pytest.mark.parametrize(
    ("low", "high", "ratio"), [(26031, 56124, 3.0), (1844, 3437, 4.0), (40230, 46998, 1.5), (56520, 59690, 2.0)]
)
def test_no_image_within_the_ratio_leaves_the_enumerated_grids(low, high, ratio):
    seen = {
        smart_resize(height, width, low, high)
        for height in range(14, 400, 2)
        for width in range(height, int(ratio * height) + 1)
    }
    found = set(grids(low, high, ratio))
    assert seen <= found
    assert max(map(windows, found)) == max(map(windows, seen))


@pytest.mark.parametrize("name", profile_names())
def test_a_written_profile_reads_back_equal(name, write):
    profile = load_profile(name)
    assert load_profile(write(profile.to_yaml())) == profile


def test_extends_lays_keys_over_a_base(write):
    base = load_profile("nv-reason-cxr-3b")
    text = MINIMAL + "decoding: {max_new_tokens: 64}\ntasks: {short: {prompt: Hi., answer: text, description: d}}\n"
    mine = load_profile(write(text))
    assert mine.decoding == dataclasses.replace(base.decoding, max_new_tokens=64)
    assert set(mine.tasks) == {*base.tasks, "short"}
    write(text)
    assert load_profile(write("extends: mine.yaml\nname: other", "other.yaml")) == dataclasses.replace(
        mine, name="other"
    )


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("max_pixel: 1", "unknown key 'max_pixel' in mine.yaml; did you mean 'max_pixels'?"),
        ("decoding: {temprature: 1}", "unknown key 'temprature' in mine.yaml.decoding; did you mean 'temperature'?"),
        ("tasks: {findings: {awnser: prose}}", "in mine.yaml.tasks.findings; did you mean 'answer'?"),
        ("tasks: {findings: {answer: poem}}", "mine.yaml.tasks.findings.answer: 'poem' is none of"),
        ("tasks: {findings: {min_images: 3}}", "mine.yaml.tasks.findings.min_images: 3 is more than max_images 1"),
        ("tasks: {findings: {max_images: 2}}", "mine.yaml.tasks.findings.max_images: 2 is more than max_images 1"),
        ("tasks: {new: {prompt: p, answer: prose}}", "mine.yaml.tasks.new.description: is missing"),
        ("max_pixels: '226576'", "mine.yaml.max_pixels: is '226576' (str), expected int"),
        ("max_pixels: 1.5", "mine.yaml.max_pixels: is 1.5 (float), expected int"),
        ("max_images: true", "mine.yaml.max_images: is True (bool), expected int"),
        ("max_images: 0", "mine.yaml.max_images: 0 is outside 1 to 16"),
        ("decoding: {temperature: .nan}", "mine.yaml.decoding.temperature: is nan"),
        ("decoding: {top_p: 0}", "mine.yaml.decoding.top_p: 0.0 is outside"),
        ("min_pixels: 300000", "mine.yaml.min_pixels: 300000 is more than max_pixels 226576"),
        ("max_sequence: 128", "mine.yaml.max_sequence: 128 is less than 2337"),
        ("default_task: finding", "mine.yaml.default_task: unknown key 'finding' in tasks; did you mean 'findings'?"),
        ("labels: Edema", "mine.yaml.labels: is 'Edema', expected a list"),
        ("labels: [Edema, 3]", "mine.yaml.labels[1]: is 3 (int), expected str"),
        ("labels: [Edema, edema]", "mine.yaml.labels: two are equal but for case"),
        ("labels: []", "mine.yaml.tasks.findings.answer: is labels, but the profile has no labels"),
        ("checkpoint: {text: {num_layers: 2}}", "unknown key 'num_layers' in mine.yaml.checkpoint.text; did you mean"),
        ("checkpoint: {vision: {depth: 0}}", "mine.yaml.checkpoint.vision.depth: 0 is outside 1 to"),
        (
            "checkpoint: {tokens: {'<|im_end|>': x}}",
            "mine.yaml.checkpoint.tokens.<|im_end|>: is 'x' (str)",
        ),
        ("licence: NC", "mine.yaml.licence: is str, expected a mapping"),
        ("notice: ' '", "mine.yaml.notice: is empty"),
        ("name: two", "mine.yaml: line 2: key 'name' is given twice"),
        ("modes: {reasoning: {}, x: 1}", "mine.yaml.modes.x: is int, expected a mapping"),
        ("? [a]\n: 1", "mine.yaml: not readable as YAML"),
        ("a: [", "mine.yaml: not readable as YAML"),
        ("a: " + "[" * 400_000, "mine.yaml: not readable as YAML"),
    ],
)
def test_mistakes_are_named_with_the_path_of_the_key(addition, message, write):
    path = write(MINIMAL + addition)
    with pytest.raises(InvalidProfile) as error:
        load_profile(path)
    assert message in error.value.message


LIMITED = """
import resource, sys
from cxr_triton.errors import InvalidProfile
from cxr_triton.profile import load_profile

resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    load_profile(sys.argv[1])
except InvalidProfile as error:
    print(error.message)
"""
BOMB = ", ".join([f"&x0 [{', '.join('1' * 10)}]"] + [f"&x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 10)])
"""Lists, each of which names the one before ten times."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"extends: chexone\nlabels: [{BOMB}]", "expected str"),
        (f"extends: chexone\ntasks: [{BOMB}]", "expected a mapping"),
        (f"extends: chexone\nlabels: {{a: [{BOMB}]}}", "expected a list"),
        ("\n".join(f"k{i}: 1" for i in range(60_000)), "unknown key"),
        ("title: " + "x" * (1 << 20), "bytes, allowed 1048576"),
    ],
    ids=["item", "list", "mapping", "keys", "size"],
)
def test_a_small_file_that_means_much_is_refused_at_once(write, text, message):
    path = write(text)
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and message in done.stdout and len(done.stdout) < 1000, done.stderr[-300:]


def test_the_profile_of_a_bundle_reads_no_other_file(write, tmp_path):
    path = write(MINIMAL)
    assert load_profile(path).name
    with pytest.raises(InvalidProfile, match="which is complete"):
        load_profile(path, alone=True)
    whole = tmp_path / "whole.yaml"
    whole.write_text(load_profile(path).to_yaml())
    assert load_profile(whole, alone=True) == load_profile(path)


def test_a_profile_that_is_not_there_is_named(write, tmp_path):
    with pytest.raises(InvalidProfile, match="did you mean 'chexone'"):
        load_profile("chexon")
    with pytest.raises(InvalidProfile, match="no profile file"):
        load_profile(tmp_path / "none.yaml")
    with pytest.raises(InvalidProfile, match="extends itself"):
        load_profile(write("extends: mine.yaml"))
    with pytest.raises(InvalidProfile, match="is list, expected a mapping"):
        load_profile(write("- a"))
    with pytest.raises(InvalidProfile, match="not readable as YAML"):
        load_profile(write("a: \x00"))


def test_the_checkpoints_penalty_and_ends_win():
    profile = load_profile("chexone")
    shipped = {"repetition_penalty": 1.05, "temperature": 1e-6, "do_sample": True, "eos_token_id": [5, 3]}
    merged = profile.merge_generation_config(shipped)
    assert merged.decoding == dataclasses.replace(profile.decoding, repetition_penalty=1.05)
    assert profile.merge_generation_config({}) == profile
    assert eos_token_ids(shipped, {"eos_token_id": 7}) == (5, 3)
    assert eos_token_ids({}, {"eos_token_id": 7}) == (7,)
    assert eos_token_ids({}, {"text_config": {"eos_token_id": 9}}) == (9,)
    for bad in (-1.0, "1.05", True, float("nan")):
        with pytest.raises(UnsupportedCheckpoint, match="repetition_penalty"):
            profile.merge_generation_config({"repetition_penalty": bad})
    for config in ({}, {"eos_token_id": []}, {"eos_token_id": "x"}):
        with pytest.raises(UnsupportedCheckpoint, match="eos_token_id"):
            eos_token_ids(config, {})
