"""deploy/: linters, the smoke test's flow with a stand-in of Docker, what the served models import."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from cxr_triton.engines.recipe import load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
TAG, TAG_VLLM = "26.07-trtllm-python-py3", "26.08-vllm-python-py3"
DIGEST = "sha256:" + "0" * 64


def lint(tool, *arguments):
    path = shutil.which(tool, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{tool} is not here; install it with pip install '.[test]'")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "gateway.Dockerfile", "front/Dockerfile"])
def test_the_dockerfiles_pass_hadolint(name):
    lint("hadolint", str(DEPLOY / name))


@pytest.mark.parametrize("name", ["Dockerfile", "gateway.Dockerfile"])
def test_images_see_every_package(name):
    seen = (DEPLOY / f"{name}.dockerignore").read_text().splitlines()
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    assert {f"!{folder}" for folder in folders} <= set(seen)
    for path in ("deploy/helm", "docs", "shared"):
        assert f"!{path}" not in seen


@pytest.mark.parametrize("name", ["smoke.sh", "vllm-cpu.sh", "helm/cxr-triton/front/run.sh"])
def test_the_scripts_pass_shellcheck(name):
    lint("shellcheck", str(DEPLOY / name))


@pytest.mark.parametrize("name", ["compose.yaml", "front/compose.yaml"])
def test_the_compose_file_is_of_the_compose_schema(name):
    lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / name))


def test_compose_itself_takes_the_file(tmp_path):
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not here; it reads compose.yaml without a daemon")
    command = [docker, "compose", "--file", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    environment = {**os.environ, "REPOSITORY": str(tmp_path), "GRAFANA_PASSWORD": "x"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def stages():
    text = (DEPLOY / "Dockerfile").read_text()
    return {part.split("\n")[0].split()[-1]: part for part in re.split(r"^(?=FROM )", text, flags=re.MULTILINE)[1:]}


def test_what_serves_is_pinned_by_digest_and_is_no_root():
    parts = stages()
    assert parts["base"].startswith("FROM ${IMAGE}@${DIGEST} AS base")
    for name, base in (("engine", "base"), ("serve", "base"), ("engine-vllm", "engine"), ("serve-vllm", "base")):
        assert parts[name].startswith(f"FROM {base} AS {name}")
        assert re.findall(r"^USER (.*)$", parts[name], re.MULTILINE)[-1] == "10001:10001"
    assert "ARG DIGEST\n" in (DEPLOY / "Dockerfile").read_text(), "a default would be one that nobody checked"
    assert "[serve]" in parts["serve"] and "[quantize]" not in parts["serve"]
    assert "[serve]" in parts["serve-vllm"] and "[quantize]" not in parts["serve-vllm"]
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["cuda"]
    for name in ("engine-vllm", "serve-vllm"):
        wanted = re.findall(r'"((?:cuda-bindings|onnxruntime-gpu)\S*)"', parts[name])
        assert len(wanted) == 2 and set(wanted) <= set(asked), "the tower's engine, in the versions of its extra"


def test_vllm_keeps_the_packages_that_its_container_has_and_a_compiler():
    parts = stages()
    held = re.search(r"grep -iE '\^\((.*?)\)=='", parts["serve-vllm"])[1].split("|")
    assert {"torch", "transformers", "vllm", "numpy"} <= set(held)
    assert "cc1" in parts["serve"] and "cc1" not in parts["serve-vllm"], "its kernels are compiled at the first use"
    assert "ENV CXR_VLLM_PYTHON=/usr/bin/python3" in parts["engine-vllm"]
    cached = re.findall(r"(?:CACHE_HOME|CACHE_ROOT|CACHE_DIR)=(\S+)", parts["serve-vllm"])
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    (mount,) = services["server-vllm"]["tmpfs"]
    assert len(cached) == 3 and all(path.startswith("/tmp/") for path in cached)
    assert mount.startswith("/tmp:exec,"), "what is compiled is loaded from there"


@pytest.mark.parametrize("stage", ["serve", "serve-vllm"])
def test_the_container_serves_only_what_was_packaged(stage):
    def of(name: str) -> list[str]:
        (found,) = re.findall(rf"^{name} (\[.*?\])$", stages()[stage], re.MULTILINE | re.DOTALL)
        return json.loads(found.replace("\\\n", ""))

    assert of("ENTRYPOINT")[-3:] == ["python3", "-m", "cxr_triton.triton_repo.guard"]
    assert of("CMD")[:2] == ["tritonserver", "--model-repository=/repository"]


def test_no_image_keeps_a_jinja2_that_the_container_brings():
    """A constraint would keep one whose sandbox leaks."""
    for name, text in stages().items():
        assert "jinja2" not in "".join(re.findall(r"grep -i?E '.*'", text)), name


def test_every_image_and_container_is_of_one_tag():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    tags = {"tensorrt-llm": TAG, "vllm": TAG_VLLM}
    for service, engine in (("server", "tensorrt-llm"), ("server-vllm", "vllm")):
        assert compose["services"][service]["image"] == f"cxr-triton-serve:{tags[engine]}"
        assert compose["services"][service]["profiles"] == [engine], "both want one port"
        assert f"tag={tags[engine]} " in (DEPLOY / "smoke.sh").read_text()
    recipes = [load_recipe(name) for name in recipe_names()]
    for recipe in (each for each in recipes if each.gpu and each.decoder.compiler in tags):
        assert recipe.container == f"nvcr.io/nvidia/tritonserver:{tags[recipe.decoder.compiler]}"


def test_everything_listens_on_loopback_and_nothing_may_gain_privileges():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"], name
    mounted = {mount.split(":")[0] for name in ("prometheus", "grafana") for mount in services[name]["volumes"]}
    for path in mounted:
        assert not path.startswith("./") or (DEPLOY / path).is_file(), path
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert scraped == [{"targets": ["server:8002"]}]
    assert services["server-vllm"]["networks"] == {"default": {"aliases": ["server"]}}


def test_the_front_door_stands_on_loopback_until_it_is_opened_and_keeps_tokens_from_the_network():
    services = yaml.safe_load((DEPLOY / "front" / "compose.yaml").read_text())["services"]
    assert services["front"]["ports"] == ["${FRONT_ADDRESS:-127.0.0.1}:8443:8443"] and "ports" not in services["tokens"]
    assert services["tokens"]["network_mode"] == "none"
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"] and service["read_only"], name
        assert "no-new-privileges:true" in service["security_opt"], name
    dockerfile = (DEPLOY / "front" / "Dockerfile").read_text()
    for file in re.search(r"^COPY (.*) /etc/front/$", dockerfile, re.MULTILINE)[1].split():
        assert (DEPLOY / "front" / file).is_file()
    assert "\nUSER 10001:10001\n" in dockerfile


@pytest.mark.parametrize("stage", ["serve", "serve-vllm"])
def test_the_server_starts_guarded_and_without_http(stage):
    text = stages()[stage]
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1])
    assert entry[1:] == ["python3", "-m", "cxr_triton.triton_repo.guard"]
    command = json.loads(
        re.search(r"^CMD (\[\"tritonserver.*?\])$", text, re.MULTILINE | re.DOTALL)[1].replace("\\\n", "")
    )
    assert command[0] == "tritonserver" and "--allow-http=false" in command
    service = stage.replace("serve", "server")
    ports = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][service]["ports"]
    assert ports == ["127.0.0.1:8001:8001"]


def test_the_dashboards_panels_lie_beside_each_other_and_ask_the_provisioned_source():
    board = json.loads((DEPLOY / "grafana" / "cxr-triton.json").read_text())
    source = yaml.safe_load((DEPLOY / "grafana" / "datasources.yml").read_text())["datasources"][0]
    assert "research" in board["description"]
    cells = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        covered = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not covered & cells and place["x"] + place["w"] <= 24, panel["title"]
        cells |= covered
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": source["type"], "uid": source["uid"]}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


DOCKER = """#!/bin/sh
echo "docker $*" >> {log}
case "$*" in
    *imagetools*) echo {digest} ;;
    *make-engine*) mkdir -p {out}/repository; echo '{{"stages": []}}' > {out}/make-engine.json ;;
    *"up --detach"*) exit {up} ;;
    *" golden "*) echo '{{"passed": false}}' > {out}/golden.json; exit {golden} ;;
esac
"""


def smoke(folder, *more, up=0, golden=0, tools=True, **env):
    """Run the script with a stand-in of Docker; gives its result and the calls."""
    binaries, log, out = folder / "bin", folder / "log", folder / "out"
    binaries.mkdir()
    log.touch()
    if tools:
        (binaries / "docker").write_text(DOCKER.format(log=log, out=out, up=up, golden=golden, digest=DIGEST))
        (binaries / "nvidia-smi").write_text("#!/bin/sh\necho 'Paper GPU, 590.44.01, 80 GiB, 9.0'\n")
        for file in binaries.iterdir():
            file.chmod(0o755)
    for name in ("bash", "dirname", "mkdir", "id", "date", "cat", "git", "basename"):
        (binaries / name).symlink_to(shutil.which(name))
    environment = {"PATH": str(binaries), "HOME": str(folder), **env}
    command = ["bash", str(DEPLOY / "smoke.sh"), str(out), *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=folder)
    return done, log.read_text().splitlines()


@pytest.mark.parametrize(
    ("recipe", "tag", "suffix", "profile"),
    [("h100-fp8-trtllm", TAG, "", "tensorrt-llm"), ("h100-fp8-vllm", TAG_VLLM, "-vllm", "vllm")],
)
def test_the_smoke_test_builds_starts_judges_and_clears_up(tmp_path, recipe, tag, suffix, profile):
    (tmp_path / "pictures").mkdir()
    done, calls = smoke(tmp_path, "org/model", "chexone", recipe, "pictures", ACCEPT_LICENCE="1")
    assert done.returncode == 0, done.stderr
    out, pictures = tmp_path / "out", tmp_path / "pictures"
    builds = [call for call in calls if call.startswith("docker build ")]
    assert [re.search(r"--target (\S+) --tag (\S+)", call).groups() for call in builds] == [
        (f"{name}{suffix}", f"cxr-triton-{name}:{tag}") for name in ("engine", "serve")
    ]
    assert all(f"--build-arg DIGEST={DIGEST}" in call for call in builds)
    (made,) = [call for call in calls if " make-engine " in call]
    assert f"--volume {out}:{out} --volume {pictures}:{pictures}:ro --gpus all" in made
    assert made.endswith(
        f"make-engine org/model --recipe {recipe} --out {out} --cache {out}/plans --json {out}/make-engine.json "
        f"--profile chexone --images {pictures} --accept-licence"
    )
    (judged,) = [call for call in calls if " golden " in call]
    assert judged.endswith(f"golden {out} --images {pictures} --json {out}/golden.json")
    assert calls.index(made) < calls.index(judged) and " down " in calls[-1]
    (started,) = [call for call in calls if " up --detach " in call]
    assert (
        started.endswith(f" server{suffix}")
        and f"--profile {profile} " in started
        and f"--profile {profile} " in calls[-1]
    )
    report = done.stdout.partition("report to paste")[2]
    assert "verdict:    passed" in report and DIGEST in report and "Paper GPU, 590.44.01" in report


def test_the_verbs_take_what_the_script_gives_them(tmp_path):
    from cxr_triton.triton_repo.command import make_engine
    from cxr_triton.triton_repo.golden import golden

    (tmp_path / "pictures").mkdir()
    _, calls = smoke(tmp_path, "org/model", "chexone", "h100-fp8-trtllm", "pictures", ACCEPT_LICENCE="1")
    for verb, called in (("make-engine", make_engine), ("golden", golden)):
        (line,) = [call for call in calls if f" {verb} " in call]
        called.make_context(verb, line.partition(f" {verb} ")[2].split())


def test_local_files_are_mounted_where_they_are(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "own.yaml").write_text("")
    done, calls = smoke(tmp_path, "weights", "own.yaml", "h100-fp8-trtllm")
    assert done.returncode == 0, done.stderr
    (made,) = [call for call in calls if " make-engine " in call]
    weights, profile = tmp_path / "weights", tmp_path / "own.yaml"
    assert f"--volume {weights}:{weights}:ro --volume {profile}:{profile}:ro" in made
    assert f"make-engine {weights} " in made and f"--profile {profile}" in made
    assert "--images" not in made and "--accept-licence" not in made


def test_a_mismatch_a_dead_server_and_a_bare_host_fail(tmp_path):
    for name in ("mismatch", "dead", "bare"):
        (tmp_path / name).mkdir()
    arguments = ("org/model", "chexone", "h100-fp8-trtllm")
    done, calls = smoke(tmp_path / "mismatch", *arguments, golden=1)
    assert done.returncode == 1 and "verdict:    REFUSED" in done.stdout and " down " in calls[-1]
    done, calls = smoke(tmp_path / "dead", *arguments, up=1)
    assert done.returncode == 1 and "did not become ready" in done.stderr
    assert any(" logs --tail 100 server" in call for call in calls) and " down " in calls[-1]
    assert not any(" golden " in call for call in calls)
    done, calls = smoke(tmp_path / "bare", *arguments, tools=False)
    assert done.returncode == 1 and "docker is not on the path" in done.stderr and not calls


def test_wrong_usage_is_status_2(tmp_path):
    done, calls = smoke(tmp_path, "org/model")
    assert done.returncode == 2 and "usage: deploy/smoke.sh" in done.stderr and not calls
    assert not (tmp_path / "out").exists()


IMPORTS = """
import importlib.abc, importlib.util, sys, types
from pathlib import Path

ALLOWED = {allowed!r}

class OnlyWhatTheImageHas(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ALLOWED:
            return None
        raise ModuleNotFoundError(f"the serving image has no {{top}}", name=name)

utils = types.ModuleType("triton_python_backend_utils")
utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
utils.TritonError = type("TritonError", (Exception,), {{}})
sys.modules["triton_python_backend_utils"] = utils
sys.meta_path.insert(0, OnlyWhatTheImageHas())
for model in {models!r}:
    spec = importlib.util.spec_from_file_location("model", Path({root!r}) / "triton_repo" / model / "1" / "model.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
import cxr_triton.engines.tensorrt_llm.runtime, cxr_triton.engines.tensorrt_llm.backend, cxr_triton.pixels.sandbox
import imagecodecs, jinja2, tokenizers
"""
# Import names of the base dependencies and of the extra `serve`, and of what those stand on.
SERVED = {"click", "imagecodecs", "jinja2", "markupsafe", "numpy", "PIL", "yaml", "tokenizers", "huggingface_hub"}
SERVED |= {"ml_dtypes", "tritonclient", "grpc", "google", "packaging", "rapidjson", "typing_extensions", "urllib3"}


def test_the_served_models_import_nothing_that_the_image_lacks():
    allowed = {*SERVED, "cxr_triton", "triton_python_backend_utils", "_cffi_backend", "_yaml"}
    code = IMPORTS.format(allowed=allowed, models=("dicom_preprocess", "decoder", "report"), root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
