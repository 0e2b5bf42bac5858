"""The cluster files by Ray's own schema, launcher and autoscaler, and every command of theirs by the tool it is for.

No cloud is asked: AWS is moto's imitation, and the shell commands run on stand-ins for uv, ray and nvidia-smi.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import runpy
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from conftest import ROOT
from potstill.cluster import ROLE, ROLES

MARKET = "ray.io/market-type"
CLUSTERS = ROOT / "docs" / "clusters"
AWS_FILE, OWN_FILE, KUBERAY_FILE = (
    ROOT / "cluster.yaml",
    CLUSTERS / "own-machines.yaml",
    CLUSTERS / "kuberay.yaml",
)
BASHRC = "case $- in *i*) ;; *) return ;; esac\n"  # as Ubuntu's begins
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "clusters.md",
    ROOT / "docs" / "explore.md",
    ROOT / "runtime_env.yaml",
    AWS_FILE,
    *sorted(p for p in CLUSTERS.iterdir() if p.suffix != ".json"),
]


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def documents(path: Path = KUBERAY_FILE) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def as_ray_reads_it(config: dict[str, Any]) -> dict[str, Any]:
    """Completed by Ray's defaults and checked against its schema, as `ray up` does."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def as_the_operator_reads_it(manifest: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler makes of a RayCluster; it checks that against the same schema."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    return _derive_autoscaling_config_from_ray_cr(copy.deepcopy(manifest))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """cluster.yaml brought up by Ray's launcher on moto, after the page's own `aws` commands; one node of each kind."""
    import boto3
    from moto import mock_aws
    from moto.ec2.models.instance_types import InstanceTypeBackend
    from ray.autoscaler._private.aws import utils
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import validate_config

    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # of the key pair
        utils.resource_cache.cache_clear()
        utils.client_cache.cache_clear()
        # of AWS's 1,400 kinds of machine those that the file names: Ray asks for all that there are
        named = {str(v) for v in read(AWS_FILE)["metadata"].values()}
        known = [k for k in InstanceTypeBackend.instance_types if k["InstanceType"] in named]
        patch.setattr(InstanceTypeBackend, "instance_types", known)
        for command in commands_of(ROOT / "docs" / "clusters.md"):
            if words(command)[:2] == ["aws", "iam"]:
                service, operation, parameters = aws_call(words(command)[1:])
                getattr(boto3.client(service), operation)(**parameters)
        config = AWSNodeProvider.fillout_available_node_types_resources(
            as_ray_reads_it(read(AWS_FILE))
        )
        validate_config(config)
        config = AWSNodeProvider.bootstrap_config(config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        ec2: Any = boto3.resource("ec2", config["provider"]["region"])
        machines = {}
        for name, kind in config["available_node_types"].items():
            tags = {"ray-node-type": "worker", "ray-launch-config": name}
            (made,) = provider.create_node(kind["node_config"], tags, 1)
            machines[name] = ec2.Instance(made)
        groups = {g["GroupId"] for m in machines.values() for g in m.security_groups}
        rules = [r for g in groups for r in ec2.SecurityGroup(g).ip_permissions]
        yield {"config": config, "machines": machines, "groups": groups, "rules": rules}
    utils.resource_cache.cache_clear()
    utils.client_cache.cache_clear()


@pytest.fixture(scope="module", params=["aws", "kuberay"])
def scaling(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The autoscaler's config of the clusters that grow and shrink."""
    if request.param == "aws":
        return request.getfixturevalue("launched")["config"]
    return as_the_operator_reads_it(documents()[0])


# ----------------------------------------------------------------------------------------- Ray's schema
@pytest.mark.parametrize("path", [AWS_FILE, OWN_FILE], ids=lambda p: p.name)
def test_ray_takes_the_file(path: Path):
    prepared = as_ray_reads_it(read(path))
    assert prepared["head_node_type"] in prepared["available_node_types"]
    for local in prepared["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).is_file(), local


@pytest.mark.parametrize(
    ("path", "spoilt"),
    [
        (AWS_FILE, {"max_worker": 3}),
        (AWS_FILE, {"max_workers": "16"}),
        (AWS_FILE, {"available_node_types": {"head": {"resources": {}}}}),
        (AWS_FILE, {"head_node_type": "gone"}),
        (AWS_FILE, {"setup_commands": [1]}),
        (OWN_FILE, {"provider": {"type": "local", "head_ip": 10, "worker_ips": []}}),
        (OWN_FILE, {"auth": {"user": "ubuntu"}}),
    ],
)
def test_ray_refuses_a_spoilt_one(path: Path, spoilt: dict[str, Any]):
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        as_ray_reads_it({**read(path), **spoilt})


@pytest.mark.parametrize(
    ("key", "value"),
    [("labels", {ROLE: "-train"}), ("minReplicas", 0.5), ("maxReplicas", None), ("template", {})],
)
def test_ray_refuses_a_spoilt_manifest(key: str, value: Any):
    manifest = documents()[0]
    as_the_operator_reads_it(manifest)
    manifest["spec"]["workerGroupSpecs"][0][key] = value
    with pytest.raises((jsonschema.ValidationError, ValueError, TypeError, KeyError)):
        as_the_operator_reads_it(manifest)


# --------------------------------------------------------------------------------- nodes and what they do
def test_nodes_have_roles_and_bounds(scaling: dict[str, Any]):
    kinds = scaling["available_node_types"]
    head = kinds[scaling["head_node_type"]]
    assert head["resources"]["CPU"] == 0, "no task runs beside Aim"
    assert head["max_workers"] == 0
    workers = [k for k in kinds.values() if k is not head]
    assert {k["labels"][ROLE] for k in kinds.values()} == set(ROLES)
    assert [k for k in workers if k["labels"][ROLE] == "head"] == []
    for kind in workers:
        assert kind["resources"]["CPU"] > 0
        assert (kind["labels"][ROLE] == "train") == (kind["resources"].get("GPU", 0) > 0)
        assert 0 <= kind["min_workers"] <= kind["max_workers"]
    markets = [k["labels"][MARKET] for k in workers if k["labels"][ROLE] == "train"]
    assert sorted(markets) == ["on-demand", "spot"]
    assert sum(k["max_workers"] for k in workers) <= scaling["max_workers"]
    assert 1 <= scaling["idle_timeout_minutes"] <= 60


def started_for(
    config: dict[str, Any],
    resources: Mapping[str, float],
    labels: dict[str, str],
    count: int,
    **options: Any,
) -> dict[str, int]:
    """Which nodes Ray's autoscaler would start for so many waiting tasks: {kind: how many}."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.common_pb2 import LabelSelectorOperator  # type: ignore[attr-defined]

    kinds = AutoscalingConfig(as_read(config), skip_content_hash=True)
    wanted_in = LabelSelectorOperator.LABEL_OPERATOR_IN
    task = ResourceRequestUtil.make(
        dict(resources), label_selectors=[[(k, wanted_in, [v]) for k, v in labels.items()]]
    )
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=kinds.get_node_type_configs(),
        max_num_nodes=kinds.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([task] * count),
        **options,
    )
    reply = ResourceDemandScheduler(Silent()).schedule(request)  # type: ignore[arg-type]
    return {launch.instance_type: launch.count for launch in reply.to_launch}


class Silent:
    """Where the scheduler tells its events."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def as_read(config: dict[str, Any]) -> dict[str, Any]:
    """A launched config less what the launcher keeps for itself, as it reaches the head."""
    kept = {k: v for k, v in copy.deepcopy(config).items() if k != "head_node"}
    # no key on this disk; its text only marks which nodes are out of date
    kept["auth"] = {k: v for k, v in kept["auth"].items() if k != "ssh_private_key"}
    return kept


def test_cpu_pressure_never_starts_a_gpu_node(scaling: dict[str, Any]):
    started = started_for(scaling, {"CPU": 1}, {ROLE: "data"}, 500)
    assert started == {"data": scaling["available_node_types"]["data"]["max_workers"]}


def test_training_takes_spot_first_and_on_demand_where_there_is_none(scaling: dict[str, Any]):
    worker, train = {"GPU": 1, "CPU": 8}, {ROLE: "train"}
    assert started_for(scaling, worker, train, 3) == {"train-spot": 3}
    refused = {"recoverable_resource_availabilities": {"train-spot": 0.0}}
    assert started_for(scaling, worker, train, 3, **refused) == {"train-on-demand": 3}
    full = {
        n: scaling["available_node_types"][n]["max_workers"]
        for n in ("train-spot", "train-on-demand")
    }
    assert started_for(scaling, worker, train, 100) == full
    paid = {**train, MARKET: "on-demand"}
    assert started_for(scaling, worker, paid, 2) == {"train-on-demand": 2}


def test_the_head_is_never_started_for_a_task(scaling: dict[str, Any]):
    assert started_for(scaling, {"CPU": 1}, {ROLE: "head"}, 3) == {}


# ------------------------------------------------------------------------------------------------- AWS
def test_aws_machines_are_what_the_file_says(launched: dict[str, Any]):
    machines, kinds = launched["machines"], launched["config"]["available_node_types"]
    for name, machine in machines.items():
        spot = kinds[name]["labels"].get(MARKET) == "spot"
        assert (machine.instance_lifecycle == "spot") == spot, name
        assert machine.metadata_options["HttpTokens"] == "required"
        role = "head" if name == "head" else "worker"
        assert machine.iam_instance_profile["Arn"].endswith(f"/potstill-{role}")
        (disk,) = machine.volumes.all()
        assert disk.size >= 100
        assert disk.encrypted
        assert disk.volume_type == "gp3"
        resources = kinds[name]["resources"]
        # Ray refuses a node whose tasks and objects may take more than it has
        assert 10**9 <= resources["object_store_memory"] <= resources.get("memory", 10**11) / 2
    gpus = {n for n, k in kinds.items() if k["resources"].get("GPU")}
    images = {n: m.image_id for n, m in machines.items()}
    assert all(("nvidia" in images[n]) == (n in gpus) for n in images)


def test_aws_knows_every_word_of_a_machine():
    """Neither boto3 nor moto look at values of which AWS takes a few only."""
    import botocore.session

    def check(value: Any, shape: Any, where: str) -> int:
        if shape.type_name == "structure":
            assert set(value) <= set(shape.members), where
            return sum(check(v, shape.members[k], f"{where}.{k}") for k, v in value.items())
        if shape.type_name == "list":
            return sum(check(v, shape.member, where) for v in value)
        words = getattr(shape, "enum", None)
        assert not words or value in words, f"{where}: {value}"
        return bool(words)

    model: Any = botocore.session.get_session().get_service_model("ec2")
    takes = model.operation_model("RunInstances").input_shape
    for name, kind in read(AWS_FILE)["available_node_types"].items():
        assert check(kind["node_config"], takes, name) >= 3


def test_aws_opens_ssh_and_nothing_else(launched: dict[str, Any]):
    assert len(launched["groups"]) == 1, "head and workers reach each other"
    open_to = {
        (r["IpProtocol"], r.get("FromPort"), r.get("ToPort"))
        for r in launched["rules"]
        if r["IpRanges"] or r["Ipv6Ranges"] or r["PrefixListIds"]
    }
    assert open_to == {("tcp", 22, 22)}
    among = [p["GroupId"] for r in launched["rules"] for p in r["UserIdGroupPairs"]]
    assert set(among) == launched["groups"]


def test_the_heads_role_may_end_this_clusters_nodes_only(launched: dict[str, Any]):
    policy = json.loads((CLUSTERS / "aws-head-policy.json").read_text())
    by_name = {s["Sid"]: s for s in policy["Statement"]}
    condition = by_name["EndWorkersOfThisCluster"]["Condition"]["StringEquals"]
    assert condition == {"aws:ResourceTag/ray-cluster-name": launched["config"]["cluster_name"]}
    for statement in policy["Statement"]:  # who may tag any machine may then end it
        if "ec2:CreateTags" in statement["Action"]:
            assert statement["Condition"]["StringEquals"] in (
                condition,
                {"ec2:CreateAction": "RunInstances"},
            )
    assert by_name["GiveWorkersTheirRole"]["Resource"].endswith(":role/potstill-worker")
    launching = {
        a
        for s in policy["Statement"]
        for a in [*([s["Action"]] if isinstance(s["Action"], str) else s["Action"])]
    }
    assert "*" not in launching


# ----------------------------------------------------------------------------- shell commands of the files
class Node:
    """A home folder on which a file's commands run, with stand-ins that record how they were called."""

    def __init__(self, home: Path, *, gpu: bool = False, bashrc: str = BASHRC) -> None:
        self.home, self.calls_file = home, home / "calls"
        (home / "potstill-env").mkdir(parents=True)
        (home / ".local" / "bin").mkdir(parents=True)
        (home / ".bashrc").write_text(bashrc)
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("a" * 64)  # Ray's launcher has copied it
        record = f'#!{sys.executable}\nimport json, os, sys\nopen({str(self.calls_file)!r}, "a").write(json.dumps('
        record += '[[os.path.basename(sys.argv[0]), *sys.argv[1:]], os.getcwd(), dict(os.environ)]) + "\\n")\n'
        self._program(".local/bin/uv", record)
        self._program("potstill-env/.venv/bin/ray", record)
        self._program("potstill-env/.venv/bin/python", record)
        if gpu:
            self._program(".local/bin/nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA L4'\n")

    def _program(self, name: str, text: str) -> None:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, commands: Sequence[str], **env: str) -> None:
        """As the launcher does over SSH, which exports OMP_NUM_THREADS=1 to whatever it runs."""
        from ray.autoscaler._private.command_runner import _with_interactive

        for command in commands:
            line = " ".join(_with_interactive(command)).replace("-c -i", "-c")
            given = {"HOME": str(self.home), "PATH": "/usr/bin:/bin", **env}
            done = subprocess.run(
                ["bash", "-c", line],
                env=given,
                cwd=self.home,
                capture_output=True,
                text=True,
                timeout=20,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def calls(self, program: str) -> list[tuple[list[str], str, dict[str, str]]]:
        lines = self.calls_file.read_text().splitlines()
        return [(c[0][1:], c[1], c[2]) for c in map(json.loads, lines) if c[0][0] == program]


def brought_up(path: Path, home: Path, part: str, **options: Any) -> Node:
    """A node after its set-up and start commands. `part`: head or worker."""
    config = as_ray_reads_it(read(path))
    node = Node(home, **options)
    (home / "potstill-env" / "spot-notice.sh").write_text("")  # its own test is below
    for times in (1, 2):  # `ray up` again does no harm
        node.run(config[f"{part}_setup_commands"])
        assert (home / ".bashrc").read_text().count("potstill-env") == 1, f"run {times}"
    node.run(config[f"{part}_start_ray_commands"], RAY_HEAD_IP="192.0.2.10")
    return node


@pytest.mark.parametrize("path", [AWS_FILE, OWN_FILE], ids=lambda p: p.name)
def test_an_account_without_settings_of_its_own_is_set_up(path: Path, tmp_path: Path):
    node = brought_up(path, tmp_path / "home", "worker", bashrc="")
    node.run(["ray status"])
    assert node.calls("ray")[-1][0] == ["status"], (
        "what `ray exec` runs finds the environment's programs"
    )


@pytest.mark.parametrize("part", ["head", "worker"])
@pytest.mark.parametrize("path", [AWS_FILE, OWN_FILE], ids=lambda p: p.name)
def test_a_node_is_set_up_once_and_starts_ray(path: Path, part: str, tmp_path: Path):
    node = brought_up(path, tmp_path / "home", part)
    venv, install = node.calls("uv")[:2]
    assert len(node.calls("uv")) == 4, "nothing but these two, in either run of the set-up"
    assert venv[0][0] == "venv"
    assert install[0][:2] == ["pip", "install"]
    assert install[0][-2:] == ["-r", "pyproject.toml"]
    assert venv[1] == install[1] == str(tmp_path / "home" / "potstill-env")
    python = venv[0][venv[0].index("--python") + 1]
    assert re.fullmatch(r"3\.\d+\.\d+", python), "Ray compares the patch level, too"
    requires = re.search(
        r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    assert requires
    assert int(requires[1]) <= int(python.split(".")[1]) < int(requires[2])

    token = tmp_path / "home" / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600, "whoever reads it may run code on every node"

    stop, start = node.calls("ray")
    assert stop[0] == ["stop"]
    flags = parsed_by_ray(start[0]).params
    env = start[2]
    assert env["RAY_AUTH_MODE"] == "token"
    assert "OMP_NUM_THREADS" not in env, "each worker would compute on one core"
    assert env["PATH"].split(":")[0] == str(tmp_path / "home" / "potstill-env" / ".venv" / "bin")
    assert env["POTSTILL_HOME"] == str(tmp_path / "home" / "potstill")
    if part == "head":
        assert flags["head"]
        assert flags["num_cpus"] == 0
        assert flags["dashboard_host"] == "127.0.0.1"
        assert flags["dashboard_port"] == 8265
        assert flags["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
        given_up_s = int(env["RAY_health_check_failure_threshold"]) * sum(
            int(env[f"RAY_health_check_{what}_ms"]) / 1000 for what in ("period", "timeout")
        )
        assert given_up_s <= 30
    else:
        assert flags["address"] == "192.0.2.10:6379"
    # the launcher asks for the second autoscaler by itself; it miscounts machines that are listed
    assert env.get("RAY_enable_autoscaler_v2") == (
        "0" if (path, part) == (OWN_FILE, "head") else None
    )


def test_own_machines_say_their_role_themselves(tmp_path: Path):
    from ray._private.label_utils import parse_node_labels_string

    def labels(part: str, **options: Any) -> dict[str, str]:
        node = brought_up(OWN_FILE, tmp_path / f"{part}{len(options)}", part, **options)
        return parse_node_labels_string(parsed_by_ray(node.calls("ray")[1][0]).params["labels"])

    assert labels("head") == {ROLE: "head"}
    assert labels("worker") == {ROLE: "data", MARKET: "on-demand"}
    assert labels("worker", gpu=True) == {ROLE: "train", MARKET: "on-demand"}


@pytest.mark.parametrize("path", [AWS_FILE, OWN_FILE], ids=lambda p: p.name)
def test_the_token_and_the_packages_travel_and_the_code_does_not(path: Path):
    mounts = read(path)["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert mounts["~/potstill-env/pyproject.toml"] == "pyproject.toml"
    assert not any((ROOT / local).is_dir() for local in mounts.values())


class Metadata(BaseHTTPRequestHandler):
    """The metadata service of a spot machine that is taken back at its third look."""

    looks = 0

    def do_PUT(self) -> None:
        self.answer(200, "secret")

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != "secret":
            return self.answer(401)
        type(self).looks += 1
        if self.looks < 3:
            return self.answer(404)
        at = (datetime.now(UTC) + timedelta(seconds=100)).strftime("%Y-%m-%dT%H:%M:%SZ")
        return self.answer(200, json.dumps({"action": "terminate", "time": at}))

    def answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_the_notice_of_a_spot_machine_reaches_ray(tmp_path: Path):
    node = Node(tmp_path / "home")
    node._program(".local/bin/pgrep", "#!/bin/sh\nexit 0\n")
    Metadata.looks = 0
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    bins = ":".join(str(node.home / b) for b in (".local/bin", "potstill-env/.venv/bin"))
    env = {
        "PATH": f"{bins}:/usr/bin:/bin",
        "EC2_METADATA_URL": f"http://127.0.0.1:{server.server_port}",
        "SPOT_POLL_S": "0.1",
        "RAY_HEAD_IP": "192.0.2.10",
    }
    try:
        command = ["bash", str(CLUSTERS / "spot-notice.sh")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert Metadata.looks == 3
    ((given, _, _),) = node.calls("ray")
    flags = parsed_by_ray(given).params
    assert flags["address"] == "192.0.2.10:6379"
    assert flags["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert 80 <= flags["deadline_remaining_seconds"] <= 100, "less a few seconds to spare"


def test_the_watch_for_a_spot_notice_ends_with_ray(tmp_path: Path):
    node = Node(tmp_path / "home")
    node._program(".local/bin/pgrep", "#!/bin/sh\nexit 1\n")
    env = {
        "PATH": f"{node.home}/.local/bin:/usr/bin:/bin",
        "SPOT_POLL_S": "0.1",
        "RAY_HEAD_IP": "x",
    }
    done = subprocess.run(["bash", str(CLUSTERS / "spot-notice.sh")], env=env, timeout=20)
    assert done.returncode == 0
    assert not node.calls_file.exists()


# ------------------------------------------------------------------------------------------ Kubernetes
# the fields of KubeRay 1.7's API that may stand here; kubectl refuses any other
SPEC = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
HEAD_GROUP = {"template", "rayStartParams", "serviceType", "labels", "resources"}
WORKER_GROUP = HEAD_GROUP - {"serviceType"} | {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "idleTimeoutSeconds",
    "priority",
}
JOB_SPEC = {"clusterSelector", "submissionMode", "entrypoint", "runtimeEnvYAML"}


def pods() -> dict[str, dict[str, Any]]:
    spec = documents()[0]["spec"]
    groups = {g["groupName"]: g for g in spec["workerGroupSpecs"]}
    return {n: g["template"]["spec"] for n, g in {"head": spec["headGroupSpec"], **groups}.items()}


def test_the_manifest_has_the_operators_fields_only():
    spec = documents()[0]["spec"]
    assert set(spec) <= SPEC
    assert set(spec["headGroupSpec"]) <= HEAD_GROUP
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
    assert spec["autoscalerOptions"]["version"] == "v2", "label selectors need it"
    assert set(documents(CLUSTERS / "kuberay-job.yaml")[0]["spec"]) <= JOB_SPEC


def test_the_manifest_asks_for_the_token_and_lets_nobody_in():
    cluster, *others = documents()
    by_kind = {(d["kind"], d["metadata"]["name"]): d for d in others}
    assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": "potstill-token"}
    assert cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    policy = by_kind["NetworkPolicy", "potstill"]["spec"]
    own = {"matchLabels": {"ray.io/cluster": cluster["metadata"]["name"]}}
    assert policy["podSelector"] == own
    assert policy["policyTypes"] == ["Ingress"]
    admitted = [
        (source, rule.get("ports")) for rule in policy["ingress"] for source in rule["from"]
    ]
    assert ({"podSelector": own}, None) in admitted
    assert [p for s, p in admitted if "namespaceSelector" in s] == [
        [{"protocol": "TCP", "port": 8265}]
    ]
    assert len(admitted) == 2
    namespaces = {d["metadata"]["namespace"] for d in (cluster, *others)}
    assert namespaces == {cluster["metadata"]["namespace"]}


def test_pods_keep_what_the_jobs_write():
    names = {(d["kind"], d["metadata"]["name"]) for d in documents()}
    home = read(ROOT / "runtime_env.yaml")["env_vars"]["POTSTILL_HOME"].replace("~", "/home/ray")
    for name, pod in pods().items():
        (container,) = pod["containers"]
        (mount,) = container["volumeMounts"]
        (volume,) = pod["volumes"]
        assert mount["mountPath"] == home
        assert mount["name"] == volume["name"]
        assert ("ServiceAccount", pod["serviceAccountName"]) in names
        assert pod["restartPolicy"] == "Never"
        if name == "head":
            claim = volume["persistentVolumeClaim"]["claimName"]
            assert ("PersistentVolumeClaim", claim) in names
        else:
            assert volume["emptyDir"]["sizeLimit"]
            assert pod["serviceAccountName"] != pods()["head"]["serviceAccountName"]


def test_a_spot_pod_says_that_it_goes():
    pod = pods()["train-spot"]
    (container,) = pod["containers"]
    *_, script = container["lifecycle"]["preStop"]["exec"]["command"]
    drain, _ = script.split(";", 1)
    flags = parsed_by_ray(shlex.split(drain)[1:]).params
    assert flags["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert flags["deadline_remaining_seconds"] < pod["terminationGracePeriodSeconds"]
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


def test_image_manifest_and_packages_are_of_one_ray():
    import ray

    image = re.search(
        r"^FROM rayproject/ray:([\d.]+)-py(\d)(\d+)$", (CLUSTERS / "Dockerfile").read_text(), re.M
    )
    assert image
    wanted = re.search(
        r'"ray\[default.*?\]>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text()
    )
    assert wanted
    versions = [
        tuple(map(int, v.split("."))) for v in (wanted[1], image[1], ray.__version__, wanted[2])
    ]
    assert versions == sorted(versions)
    assert documents()[0]["spec"]["rayVersion"] == image[1]
    assert f"ray=={image[1]}" in (CLUSTERS / "Dockerfile").read_text()
    images = {c["image"] for pod in pods().values() for c in pod["containers"]}
    assert len(images) == 1
    assert all(i.endswith(f":{image[1]}") for i in images)


# ------------------------------------------------------------------------------------- runtime_env.yaml
def test_the_job_takes_the_code_and_little_else(tmp_path: Path):
    """Without .gitignore: a downloaded archive has none."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package
    from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args
    from ray.runtime_env import RuntimeEnv

    said = parse_runtime_env_args(str(ROOT / "runtime_env.yaml"), working_dir=".")
    assert said["working_dir"] == "."
    env = RuntimeEnv(**said)
    assert set(env) == {"working_dir", "excludes", "env_vars"}
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=False, excludes=list(env["excludes"]))
    assert package.stat().st_size < 10 * 2**20
    names = set(zipfile.ZipFile(package).namelist())
    top = {n.split("/")[0] for n in names}
    assert {"platform", "jobs", "conf", "pyproject.toml"} <= top
    assert not top & {".git", ".venv", "runs", "cache", "tests", "docs", "uv.lock"}
    needed = [p for folder in ("platform", "jobs", "conf") for p in (ROOT / folder).rglob("*")]
    needed = [p for p in needed if p.is_file() and "__pycache__" not in p.parts]
    assert {p.relative_to(ROOT).as_posix() for p in needed} <= names


def test_the_settings_of_a_job_are_those_that_ray_and_we_read():
    from ray.dashboard.modules.job import job_supervisor

    env = read(ROOT / "runtime_env.yaml")["env_vars"]
    assert all(isinstance(v, str) for v in env.values())
    assert env["PYTHONPATH"] == "platform"
    assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert "RAY_JOB_STOP_WAIT_TIME_S" in Path(job_supervisor.__file__).read_text()
    job = yaml.safe_load(documents(CLUSTERS / "kuberay-job.yaml")[0]["spec"]["runtimeEnvYAML"])
    assert job["env_vars"] == env


# --------------------------------------------------------------------------------------- every command
def commands_of(path: Path) -> list[str]:
    """The commands that a page shows: blocks of sh in Markdown, deeper comments at the top of the other files."""
    text = path.read_text()
    if path.suffix == ".md":
        lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    else:
        top = [line[1:] for line in text.splitlines() if line.startswith("#")]
        lines = [line.removeprefix("   ") for line in top if line.startswith("   ")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [line for line in joined.splitlines() if line.strip()]


def words(command: str) -> list[str]:
    named = re.sub(
        r"<([\w ]+)>", lambda m: m[1].replace(" ", "-"), command
    )  # <folder>, <cache key>
    return shlex.split(named.replace("…", ""), comments=True)


def all_commands() -> list[Any]:
    return [
        pytest.param(words(c), id=f"{p.name}:{' '.join(words(c))[:70]}")
        for p in PAGES
        for c in commands_of(p)
        if "--config-dir runs/" not in c  # that folder is a search's, which has to be run first
    ]


class Parsed(Exception):
    """A job's command line was understood."""


def parsed_by_ray(arguments: Sequence[str]) -> click.Context:
    """The context in which Ray's own command would run."""
    from ray.scripts.scripts import cli

    command, parent, rest, name = cli, None, list(arguments), "ray"
    while True:
        context = command.make_context(name, rest, parent=parent)
        if not isinstance(command, click.Group):
            return context
        found, sub, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert sub is not None
        name, command, parent = str(found), sub, context


def check_job(script: str, arguments: list[str]) -> None:
    """The job's own parser takes them, and where they are of a config, it composes."""
    path = ROOT / script
    assert path.is_file(), f"{script} is no job"
    composes = "from potstill.config import" in path.read_text()
    real = argparse.ArgumentParser.parse_known_args

    def parse(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        _, unknown = real(parser, *args, **kwargs)
        assert not unknown, unknown
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments, *(["--cfg"] if composes else [])])
        patch.setattr("potstill.config._keys_help", lambda name: "")  # a second's work for --help
        if not composes:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        with pytest.raises((Parsed, SystemExit)) as left:
            runpy.run_path(str(path), run_name="__main__")
    status = left.value.code if isinstance(left.value, SystemExit) else 0
    assert status == 0, f"{script} {shlex.join(arguments)}"


def aws_call(arguments: list[str]) -> tuple[str, str, dict[str, str]]:
    """(service, method of its client, parameters) of an `aws` command, by the service's own model."""
    import botocore.session
    from botocore import xform_name

    service, operation, *flags = arguments
    model: Any = botocore.session.get_session().get_service_model(service)
    names = {xform_name(n, "-"): n for n in model.operation_names}
    shape = model.operation_model(names[operation]).input_shape
    assert shape is not None
    members = {f"--{xform_name(m, '-')}": m for m in shape.members}
    assert len(flags) % 2 == 0
    given = {}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        read_from = value.removeprefix("file://")
        given[members[flag]] = (ROOT / read_from).read_text() if read_from != value else value
    assert set(shape.required_members) <= set(given)
    return service, xform_name(names[operation]), given


# what no parser of ours knows: the verbs that may stand on a page, whose files must exist
OTHERS = {
    "uv": {"sync"},
    "git": {"archive"},
    "pip": {"install"},
    "helm": {"repo", "install"},
    "kubectl": {"create", "apply", "delete", "get", "port-forward"},
    "docker": {"build"},
}


def check(command: list[str]) -> None:
    if "&&" in command:
        at = command.index("&&")
        check(command[:at])
        return check(command[at + 1 :])
    command = command[2:] if command[:2] == ["uv", "run"] else list(command)
    while command and re.match(r"\w+=", command[0]):
        command = command[1:]  # VARIABLE=value command
    program, *rest = command
    if program == "export":
        assert re.fullmatch(r"\w+=\S+", " ".join(rest))
    elif program == "cd":
        assert len(rest) == 1
    elif program == "pytest":
        assert not rest
    elif program == "ssh":
        check(words(rest[-1]))
    elif program == "chmod":
        assert rest == ["600", "~/.ray/auth_token"]
    elif program == "ray":
        check_ray(rest)
    elif program == "aws" and rest[:2] == ["s3", "cp"]:
        assert rest[3].startswith("s3://")
    elif program == "aws":
        aws_call(rest)
    elif program == "python" or program.startswith("jobs/"):
        check_job(*((rest[0], rest[1:]) if program == "python" else (program, rest)))
    else:
        assert program in OTHERS, f"nothing here can tell whether `{shlex.join(command)}` is right"
        verbs = [w for w in rest if w in OTHERS[program]]
        assert verbs, shlex.join(command)
        for flag, value in itertools.pairwise(rest):
            if flag in ("--filename", "--file"):
                assert (ROOT / value).is_file(), value


def check_ray(rest: list[str]) -> None:
    context = parsed_by_ray(rest)
    given = context.params
    if file := given.get("cluster_config_file"):
        assert (ROOT / file).is_file(), file
    if address := given.get("address"):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address), "submitted through the tunnel"
    if "entrypoint" in given:
        assert given["working_dir"] == "."
        assert (ROOT / given["runtime_env"]).is_file()
        check(list(given["entrypoint"]))
    if told := given.get("cmd"):
        for part in re.split(r"\s*(?:&&|;)\s*", told):
            check(shlex.split(part))


@pytest.mark.parametrize("command", all_commands())
def test_a_command_that_is_shown_is_one(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(ROOT)
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "uv run ray up --yess cluster.yaml",
        "uv run ray up gone.yaml",
        "uv run ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/train.py",
        "uv run ray job submit --address http://10.0.0.1:8265 --working-dir . --runtime-env runtime_env.yaml -- python jobs/train.py data.root=x",
        "uv run ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env runtime_env.yaml -- python jobs/train.py data.rot=x",
        "uv run ray exec cluster.yaml 'cd code && python jobs/gone.py'",
        "uv run jobs/monitor.py --onse",
        "aws iam create-role --role-name x",
        "aws iam create-role --role x --assume-role-policy-document y",
        "kubectl apply --filename gone.yaml",
        "curl example.org",
    ],
)
def test_a_stale_command_is_found(command: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, click.ClickException, KeyError, TypeError, SystemExit)):
        check(words(command))


def test_the_page_and_the_files_show_the_commands_of_a_users_day():
    shown = {" ".join(w for w in p.values[0] if not w.startswith("-")) for p in all_commands()}
    for needed in (
        "ray up",
        "ray dashboard",
        "ray attach",
        "ray down",
        "ray get-auth-token",
        "ray job stop",
        "ray job logs",
    ):
        assert any(needed in s for s in shown), needed
