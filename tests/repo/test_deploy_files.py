import ast
import dataclasses
import importlib
import json
import re
from itertools import pairwise

import pytest
import yaml
from repository import ROOT, named, package_modules, parsed, pins
from server_fakes import FakeEngine

from flux_nf4.cli.options import parameters
from flux_nf4.cli.serve import ServeOptions
from flux_nf4.cli.settings import PREFIX
from flux_nf4.errors import InputError
from flux_nf4.server.metrics import Metrics
from flux_nf4.server.settings import ServeSettings

DEPLOY = ROOT / "deploy"
GUIDE = ROOT / "docs/deployment.md"
RAY_SERVICE = DEPLOY / "kubernetes/rayservice.yaml"
YAML_FILES = sorted(DEPLOY.rglob("*.yaml"))
OPTIONS = {parameter.name: parameter for parameter in parameters(ServeOptions)}


def text_of(path):
    return path.read_text(encoding="utf-8")


def documents(path):
    return [each for each in yaml.safe_load_all(text_of(path)) if each is not None]


def objects():
    """Every object for Kubernetes without Ray, by kind."""
    files = [path for path in YAML_FILES if path != RAY_SERVICE]
    found = [each for path in files for each in documents(path) if "kind" in each]
    return {each["kind"]: each for each in found}


def pod():
    return objects()["Deployment"]["spec"]["template"]["spec"]


def container():
    return pod()["containers"][0]


def strings(node):
    """All texts in a tree of lists and mappings, with their keys."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from strings(value)
            if isinstance(value, str):
                yield key, value
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)


# ---- metrics ------------------------------------------------------------------------------------

BOARD = DEPLOY / "grafana/flux-nf4.json"
RULES = DEPLOY / "prometheus/alerts.yaml"


def queries():
    board = [text for key, text in strings(json.loads(text_of(BOARD))) if key == "expr"]
    rules = [text for key, text in strings(documents(RULES)) if key == "expr"]
    return board + rules


def served_names():
    """Every name that `/metrics` may serve, and every label."""
    metrics = Metrics(FakeEngine())
    names, labels = set(), {"le", "instance", "job"}
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        names |= {family.name + suffix for suffix in suffixes.get(family.type, [""])}
        labels |= {label for sample in family.samples for label in sample.labels}
    for collector in vars(metrics).values():
        labels |= set(getattr(collector, "_labelnames", ()))
    return names, labels


def test_every_metric_of_board_and_rules_is_served():
    asked = {name for query in queries() for name in re.findall(r"flux_nf4_\w+", query)}

    assert len(asked) > 15
    assert asked - served_names()[0] == set()


def test_every_label_of_board_and_rules_is_served():
    asked = set()
    for query in queries():
        asked |= set(re.findall(r"(\w+)(?:=~|!=|=)\"", query))
        for labels in re.findall(r"by \(([^)]+)\)", query):
            asked |= {label.strip() for label in labels.split(",")}

    assert asked - served_names()[1] == set()


def test_the_autoscaler_asks_for_a_metric_that_is_served():
    metric = objects()["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]

    assert metric in served_names()[0]


def test_every_rule_says_how_bad_it_is_and_what_to_do():
    (rules,) = (group["rules"] for group in documents(RULES)[0]["groups"])

    assert {rule["labels"]["severity"] for rule in rules} == {"warning", "critical"}
    assert all(set(rule["annotations"]) == {"summary", "description"} for rule in rules)


def test_every_rule_is_tried_by_promtools_test():
    names = {rule["alert"] for rule in documents(RULES)[0]["groups"][0]["rules"]}

    assert (
        names - set(re.findall(r'alertname="(\w+)"', text_of(RULES.with_stem("alerts_test"))))
        == set()
    )


def test_no_panel_lies_over_another():
    places = [panel["gridPos"] for panel in json.loads(text_of(BOARD))["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


# ---- settings -----------------------------------------------------------------------------------


def variables():
    """Every `FLUX_NF4_*` that a file sets or the guide names, with where."""
    files = [*YAML_FILES, DEPLOY / "Dockerfile", DEPLOY / "flux-nf4.service", GUIDE]
    for path in files:
        for name in re.findall(rf"\b{PREFIX}[A-Z_]+\b", text_of(path)):
            yield named(path), name.removeprefix(PREFIX).lower()


def test_every_variable_is_a_setting_of_the_server():
    # The key itself is no option; the rest are compose's own, and say what to put in.
    known = {name for name, each in OPTIONS.items() if each.flag.setting}
    known |= {"api_key", "model_file", "models"}

    assert [each for each in variables() if each[1] not in known] == []


def test_every_option_in_the_guide_is_one_of_the_servers():
    lines = text_of(GUIDE).replace("\\\n", " ").splitlines()
    served = [line.split("#")[0] for line in lines if "flux-nf4 serve" in line]
    asked = {flag for line in served for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    names = {name for each in OPTIONS.values() for name in each.flag.names}

    assert asked - names == {"--help"}


def test_no_file_takes_the_place_of_the_secret_that_the_guide_makes():
    assert "Secret" not in objects()


# ---- containers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML_FILES, ids=named)
def test_yaml_is_yaml(path):
    assert documents(path)


def test_kustomize_names_files_that_exist():
    folder = DEPLOY / "kubernetes"

    resources = objects()["Kustomization"]["resources"]
    assert [each for each in resources if not (folder / each).is_file()] == []


def dockerfile():
    """Its instructions, without comments, each on one line."""
    text = re.sub(r"^\s*#.*\n", "", text_of(DEPLOY / "Dockerfile"), flags=re.MULTILINE)
    return text.replace("\\\n", " ").splitlines()


def test_the_image_runs_as_nobody_in_particular():
    (user,) = (line.split()[1] for line in dockerfile() if line.startswith("USER"))

    assert user == "{0}:{0}".format(pod()["securityContext"]["runAsUser"])


def test_the_image_holds_what_is_pinned():
    installs = [line for line in dockerfile() if "pip install" in line]

    assert len(installs) == 2
    assert all("--constraint constraints.txt" in line for line in installs)


def test_no_secret_is_handed_to_the_build():
    lines = [line for line in dockerfile() if line.startswith(("ARG", "ENV", "COPY"))]

    assert [line for line in lines if re.search(r"key|token|secret|password", line, re.I)] == []


def test_the_builder_sees_only_what_is_copied():
    ignored = text_of(DEPLOY / "Dockerfile.dockerignore").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copies = [line.split()[1:-1] for line in dockerfile() if line.startswith("COPY ")]
    copied = {name.removeprefix("./") for names in copies for name in names if "--" not in name}

    assert ignored[1] == "*"
    assert sent == {name for name in copied if not name.startswith("/")}


def test_the_server_and_nothing_else_gets_the_signal():
    (entry,) = (line for line in dockerfile() if line.startswith("ENTRYPOINT"))

    assert json.loads(entry.removeprefix("ENTRYPOINT ")) == ["tini", "--", "flux-nf4"]
    assert "shell" not in entry


# ---- Kubernetes and compose ---------------------------------------------------------------------


def environment():
    return {each["name"]: each["value"] for each in container()["env"]}


def test_there_is_time_to_drain():
    pause_s = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = float(environment()["FLUX_NF4_DRAIN_TIMEOUT"])

    assert pod()["terminationGracePeriodSeconds"] > pause_s + drain_s + 5


def test_compose_leaves_time_to_drain():
    (compose,) = documents(DEPLOY / "compose.yaml")

    for service in compose["services"].values():
        grace_s = int(service["stop_grace_period"].removesuffix("s"))
        assert grace_s > float(service["environment"]["FLUX_NF4_DRAIN_TIMEOUT"]) + 5


def test_systemd_leaves_time_to_drain():
    unit = text_of(DEPLOY / "flux-nf4.service")
    default_s = next(
        field.default
        for field in dataclasses.fields(ServeSettings)
        if field.name == "drain_timeout_s"
    )

    assert int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1]) > default_s + 5


def test_systemd_hides_no_gpu():
    unit = text_of(DEPLOY / "flux-nf4.service")

    # Whoever allows one device forbids all others (github.com/systemd/systemd/issues/18142).
    assert not re.search(r"^(PrivateDevices|ProtectClock|DevicePolicy|DeviceAllow)=", unit, re.M)


@pytest.mark.parametrize(
    ("probe", "path"),
    [("startupProbe", "/startupz"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")],
)
def test_each_probe_asks_its_own_question(probe, path):
    assert container()[probe]["httpGet"] == {"path": path, "port": "http"}


def test_a_model_may_take_its_time_to_load():
    probe = container()["startupProbe"]

    assert probe["periodSeconds"] * probe["failureThreshold"] >= 600


def test_a_pod_may_do_nothing_but_serve():
    security = container()["securityContext"]

    assert pod()["securityContext"]["runAsNonRoot"]
    assert pod()["automountServiceAccountToken"] is False
    assert security["readOnlyRootFilesystem"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_every_volume_is_mounted_and_every_mount_is_a_volume():
    volumes = {volume["name"] for volume in pod()["volumes"]}
    mounts = {mount["name"] for mount in container()["volumeMounts"]}

    assert volumes == mounts


def test_every_selector_finds_the_pods():
    labels = objects()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    kinds = objects()
    selectors = [
        kinds["Deployment"]["spec"]["selector"]["matchLabels"],
        kinds["Service"]["spec"]["selector"],
        kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        kinds["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]

    assert [each for each in selectors if not each.items() <= labels.items()] == []


def test_the_keys_that_are_read_are_in_the_secret_that_the_guide_makes():
    ((name, files),) = re.findall(r"create secret generic (\S+) (.+)", text_of(GUIDE))
    held = re.findall(r"--from-file=(\S+)", files)
    credentials = objects()["ServiceMonitor"]["spec"]["endpoints"][0]["authorization"][
        "credentials"
    ]
    (mounted,) = (each["secret"] for each in pod()["volumes"] if "secret" in each)

    assert {credentials["name"], mounted["secretName"]} == {name}
    assert {credentials["key"], *(item["key"] for item in mounted["items"])} == set(held)


def ray_service():
    service, _ = documents(RAY_SERVICE)
    return service["spec"]["rayClusterConfig"], yaml.safe_load(service["spec"]["serveConfigV2"])


def test_kuberay_imports_what_there_is():
    (application,) = ray_service()[1]["applications"]
    module, _, name = application["import_path"].partition(":")

    assert callable(getattr(importlib.import_module(module), name))


def test_kuberay_runs_the_version_that_is_pinned_and_asks_for_a_token():
    cluster, _ = ray_service()

    assert cluster["rayVersion"] == pins()["ray"]
    assert cluster["authOptions"] == {"mode": "token"}


def test_the_pods_of_ray_may_do_nothing_but_serve_either():
    cluster, _ = ray_service()
    templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]

    for pod_spec in (each["template"]["spec"] for each in templates):
        assert pod_spec["securityContext"] == pod()["securityContext"]
        assert pod_spec["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


# ---- proxies ------------------------------------------------------------------------------------


def test_streams_pass_the_proxies_unbuffered():
    assert "proxy_buffering off;" in text_of(DEPLOY / "nginx.conf")
    assert "flush_interval -1" in text_of(DEPLOY / "Caddyfile")


def test_a_proxy_takes_the_uploads_that_the_server_takes():
    (megabytes,) = re.findall(r"client_max_body_size (\d+)m;", text_of(DEPLOY / "nginx.conf"))
    server = ServeSettings().max_upload_bytes

    assert int(megabytes) * 2**20 >= server


# ---- the guide ----------------------------------------------------------------------------------


def test_the_guide_leads_to_every_file():
    files = [path for path in DEPLOY.rglob("*") if path.is_file()]
    text = text_of(GUIDE)

    assert [named(path) for path in files if path.name not in text] == []


def test_the_guide_shows_every_alert():
    names = [rule["alert"] for rule in documents(RULES)[0]["groups"][0]["rules"]]

    assert [name for name in names if name not in text_of(GUIDE)] == []


def test_its_headings_do_not_skip_a_level():
    outside = re.sub(r"^```.*?^```", "", text_of(GUIDE), flags=re.MULTILINE | re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", outside, re.MULTILINE)]

    assert all(below <= above + 1 for above, below in pairwise(levels))


def test_serving_others_without_a_key_is_refused_as_the_guide_says():
    with pytest.raises(InputError, match="no API key is set"):
        ServeSettings(host="0.0.0.0")


# ---- THREATS.md ---------------------------------------------------------------------------------


def test_every_test_that_the_threat_model_names_exists():
    asked = set(re.findall(r"`(test_\w+)`", text_of(ROOT / "THREATS.md")))
    sources = [text_of(path) for path in (ROOT / "tests").rglob("test_*.py")]
    known = {name for text in sources for name in re.findall(r"def (test_\w+)\(", text)}

    assert len(asked) > 30
    assert asked - known == set()


# Whatever reads these runs what it reads.
UNSAFE = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "yaml"}


def test_the_package_never_unpickles_or_evaluates():
    found = []
    for path in package_modules():
        for node in ast.walk(parsed(path)):
            match node:
                case ast.Import(names=names):
                    found += [named(path) for each in names if each.name.split(".")[0] in UNSAFE]
                case ast.ImportFrom(module=str(module)) if module.split(".")[0] in UNSAFE:
                    found.append(named(path))
                case ast.Call(func=ast.Name(id="eval" | "exec")):
                    found.append(named(path))
                case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                    found.append(named(path))

    assert found == []
