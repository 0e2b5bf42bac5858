"""Clusters on one machine, each in network namespaces of its own: with a fake autoscaler, or of several hosts.

As root, with Debian's iproute2 and util-linux. Nothing here reaches another Ray of this machine, and what a cluster has
started is ended process by process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from conftest import ROOT, skip

HEAD_ID = "f" * 51 + "00000"
BIN = Path(sys.executable).parent
# a lost host is noticed in seconds
QUICK = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}


def refuse_without_namespaces() -> None:
    """Skip where this machine cannot give a test hosts of its own."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        skip("needs root, and Debian's iproute2 and util-linux, for network namespaces")
    name = f"try{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        skip("this machine does not allow network namespaces")
    subprocess.run(["ip", "netns", "del", name], check=True)


def wait_for(
    what: str, seen: Callable[[], Any], timeout_s: float, about: Callable[[], str] = str
) -> Any:
    """Until `seen()` is true, and what it is. `about`: what a reader of the failure wants to know."""
    deadline = time.monotonic() + timeout_s
    while not (found := seen()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s\n{about()}"
        time.sleep(0.5)
    return found


def outside() -> dict[str, str]:
    """The environment of a user's shell: without what a Ray of this process, or a search, has set for its children."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))}


class Host:
    """A network namespace, with mounts of its own where it hides folders."""

    def __init__(self, name: str, env: Mapping[str, str], prefix: list[str] | None = None) -> None:
        self.name, self.env = name, dict(env)
        self.prefix = ["ip", "netns", "exec", name, *(prefix or [])]

    def command(self, *command: str) -> list[str]:
        return [*self.prefix, *command]

    def run(self, *command: str, timeout_s: float = 120, **options: Any) -> str:
        done = subprocess.run(
            self.command(*command),
            env={**outside(), **self.env},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            **options,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def end(self) -> None:
        """End every process of this host."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            for _ in range(30):
                pids = subprocess.run(
                    ["ip", "netns", "pids", self.name], capture_output=True, text=True
                ).stdout.split()
                if not pids:
                    return
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), sent)
                time.sleep(0.1)


class Cluster:
    """What a user has of a cluster: the commands of Ray, given on its head."""

    def __init__(self, head: Host, address: str) -> None:
        self.head, self.address = head, address  # of the dashboard

    def submit(self, job: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """`ray job submit` as the README has it, from a copy of the code. Returns the job's id."""
        return self.submit_command("python", f"jobs/{job}.py", *arguments, env=env)

    def submit_command(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        said = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
        said["env_vars"] |= {k: v for k, v in self.head.env.items() if k.startswith("POTSTILL")}
        said["env_vars"] |= dict(env or {})
        name = f"job-{uuid.uuid4().hex[:8]}"
        flags = ["--address", self.address, "--submission-id", name, "--no-wait"]
        given = ["--working-dir", ".", "--runtime-env-json", json.dumps(said)]
        submit = [str(BIN / "ray"), "job", "submit", *flags, *given, "--", *command]
        for left in (3, 2, 1, 0):
            try:
                self.head.run(*submit, cwd=ROOT)
                return name
            except AssertionError as error:  # a head that has just started may lack its agent
                if not left or "No available agent" not in str(error):
                    raise
                time.sleep(2)
        raise AssertionError("not reached")

    def job(self, *command: str) -> str:
        verb, *rest = command
        ray = str(BIN / "ray")
        return self.head.run(ray, "job", verb, "--address", self.address, *rest, cwd="/")

    def status(self, name: str) -> str:
        return self.get(f"/api/jobs/{name}")["status"]

    def logs(self, name: str) -> str:
        """What the job has printed so far."""
        return self.get(f"/api/jobs/{name}/logs")["logs"]

    def ended(self, name: str, timeout_s: float = 240) -> str:
        """How a job ended, its log with it where that is not well."""
        over = ("SUCCEEDED", "FAILED", "STOPPED")
        found = wait_for(
            f"the end of {name}", lambda: (s := self.status(name)) in over and s, timeout_s
        )
        return found if found != "FAILED" else f"FAILED\n{self.logs(name)[-4000:]}"

    def get(self, path: str) -> Any:
        """What the dashboard answers: for looking often, as `ray` takes seconds to start."""
        code = (
            "import os, sys, urllib.request as r; "
            "q = r.Request(sys.argv[1], headers={'Authorization': "
            "'Bearer ' + open(os.environ['RAY_AUTH_TOKEN_PATH']).read().strip()}); "
            "print(r.urlopen(q, timeout=60).read().decode())"
        )
        ask = (sys.executable, "-S", "-c", code, self.address + path)
        for left in (2, 1):
            with suppress(AssertionError):  # busy, once in thousands of questions
                return json.loads(self.head.run(*ask))
            time.sleep(left)
        return json.loads(self.head.run(*ask))

    def nodes(self) -> list[dict[str, Any]]:
        """Ray's records of the nodes that are alive."""
        found = self.get("/api/v0/nodes?detail=1&limit=100")["data"]["result"]["result"]
        return [n for n in found if n["state"] == "ALIVE"]

    def roles(self) -> list[str]:
        return sorted(n["labels"].get("potstill.io/role", "?") for n in self.nodes())

    def training_nodes(self) -> set[str]:
        """The ids of the nodes with a process of Ray Train's workers."""
        return {a["node_id"] for a in self._training() if a["node_id"]}

    def node_of(self, pid: int) -> str | None:
        """The id of the node with this process of Ray Train's workers, where all nodes are on one machine."""
        return next((a["node_id"] for a in self._training() if a["pid"] == pid), None)

    def _training(self) -> list[dict[str, Any]]:
        found = self.get("/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
        return [a for a in found if a["state"] == "ALIVE" and a["class_name"] == "RayTrainWorker"]


@contextmanager
def _folders() -> Iterator[Path]:
    # Ray's sockets have names of at most 107 characters
    base = Path(tempfile.mkdtemp(prefix="ps", dir="/tmp"))
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _token(base: Path) -> dict[str, str]:
    token = base / "token"
    token.write_text(uuid.uuid4().hex * 2)
    token.chmod(0o600)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def _environment(base: Path) -> dict[str, str]:
    own = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "POTSTILL_HOME": str(base / "home"),
        "OMP_WAIT_POLICY": "passive",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        **_token(base),
    }
    (base / "home").mkdir()
    return own


def autoscaling(gpus: int = 1) -> dict[str, Any]:
    """A fake cluster's configuration: one kind of data nodes, and one of nodes that say they have a GPU."""
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    each = {"CPU": 1, "object_store_memory": 100_000_000}
    lists = (
        *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands"),
        *("setup_commands", "head_setup_commands", "worker_setup_commands"),
        *("head_start_ray_commands", "worker_start_ray_commands"),
    )
    empty: dict[str, Any] = {key: [] for key in lists}
    empty |= {key: {} for key in ("file_mounts", "docker")}
    kinds = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "data": {
            "resources": each,
            "labels": {"potstill.io/role": "data"},
            **{"node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "train": {
            "resources": {**each, "GPU": gpus},
            "labels": {"potstill.io/role": "train", "ray.io/market-type": "spot"},
            **{"node_config": {}, "min_workers": 0, "max_workers": 2},
        },
    }
    return {
        "cluster_name": "fake",
        "max_workers": 4,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": provider,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": "127.0.0.1:6379",
        },
        "auth": {"ssh_user": "x"},
        "head_node_type": "ray.head.default",  # the fake provider knows no other name
        "available_node_types": kinds,
        "file_mounts_sync_continuously": False,
        **empty,
    }


@contextmanager
def autoscaling_cluster() -> Iterator[Cluster]:
    """A head without cores, and an autoscaler whose nodes are processes of this machine."""
    refuse_without_namespaces()
    name = f"ps{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    with _folders() as base:
        host = Host(name, _environment(base))
        try:
            host.run("ip", "link", "set", "lo", "up")
            config = base / "fake.yaml"
            config.write_text(yaml.safe_dump(autoscaling()))
            ids = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
            fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
            start = Host(name, {**host.env, **ids, **fake, "RAY_enable_autoscaler_v2": "1"})
            start.run(
                *(str(BIN / "ray"), "start", "--head", "--port", "6379", "--num-cpus", "0"),
                *("--node-ip-address", "127.0.0.1", "--temp-dir", str(base / "ray")),
                *("--object-store-memory", "200000000", f"--autoscaling-config={config}"),
                *("--labels", "potstill.io/role=head", "--dashboard-host", "127.0.0.1"),
            )
            yield Cluster(host, "http://127.0.0.1:8265")
        finally:
            host.end()
            subprocess.run(["ip", "netns", "del", name], check=False)


class Hosts(Cluster):
    """A head and workers with addresses of their own, whose homes and Ray folders are their own; none has our code."""

    def __init__(self, base: Path, name: str, workers: int) -> None:
        self.base, self.name, self.workers = base, name, workers
        self.address_of = {i: f"10.77.0.{i}" for i in range(1, workers + 3)}
        self.hosts: dict[int, Host] = {}

    def start(self) -> None:
        base, name, workers = self.base, self.name, self.workers
        env = {**_environment(base), **QUICK}
        self._run("ip", "netns", "add", f"{name}b")
        self._run("ip", "-n", f"{name}b", "link", "add", "br0", "type", "bridge")
        self._run("ip", "-n", f"{name}b", "link", "set", "br0", "up")
        for i in self.address_of:
            self.hosts[i] = self._host(i, env)
        super().__init__(self.hosts[1], "http://10.77.0.1:8265")
        self.laptop = Host(
            self.hosts[workers + 2].name, env
        )  # sees the code, as a user's machine does
        flags = ["--disable-usage-stats", "--object-store-memory", "100000000"]
        self.head.run(
            *(str(BIN / "ray"), "start", "--head", "--port", "6379", "--num-cpus", "0", *flags),
            *("--node-ip-address", "10.77.0.1", "--dashboard-host", "10.77.0.1"),
            *("--labels", "potstill.io/role=head"),
        )
        for i in range(2, workers + 2):
            self.hosts[i].run(
                *(str(BIN / "ray"), "start", "--address", "10.77.0.1:6379", "--num-cpus", "1"),
                *("--node-ip-address", self.address_of[i], *flags),
                *("--labels", "potstill.io/role=data"),
            )

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True)

    def _host(self, i: int, env: Mapping[str, str]) -> Host:
        """Behind a cable to the bridge, with a /tmp/ray and a home folder of its own, and our code hidden."""
        name, cable = f"{self.name}h{i}", f"c{i}"
        self._run("ip", "netns", "add", name)
        about = ("type", "veth", "peer", "name", "eth0", "netns", name)
        self._run("ip", "-n", f"{self.name}b", "link", "add", cable, *about)
        self._run("ip", "-n", f"{self.name}b", "link", "set", cable, "master", "br0", "up")
        self._run("ip", "-n", name, "addr", "add", f"{self.address_of[i]}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self._run("ip", "-n", name, "link", "set", device, "up")
        own = self.base / f"h{i}"
        for folder in ("ray", "home", "none", "tmp"):
            (own / folder).mkdir(parents=True)
        hosts = [f"{address} h{n}" for n, address in self.address_of.items()]
        (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        Path("/tmp/ray").mkdir(exist_ok=True)
        places = {
            own / "hosts": "/etc/hosts",
            own / "ray": "/tmp/ray",
            own / "home": self.base / "home",
            **{own / "none": ROOT / "platform"},
        }
        mounts = [f"mount --bind {source} {target}" for source, target in places.items()]
        mounts += [f"mount --bind {own / 'none'} {ROOT / folder}" for folder in ("jobs", "conf")]
        script = "; ".join(
            [
                f"set -e; hostname h{i}; mount --make-rprivate /; mount -t tmpfs tmpfs /dev/shm",
                *mounts,
                'exec "$@"',
            ]
        )
        return Host(name, env, ["unshare", "-m", "-u", "bash", "-c", script, "--"])

    def submit_command(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        head, self.head = self.head, self.laptop
        try:
            return super().submit_command(*command, env=env)
        finally:
            self.head = head

    def home_of(self, i: int) -> Path:
        """The folder that is POTSTILL_HOME on a host."""
        return self.base / f"h{i}" / "home"

    def training_on(self) -> set[int]:
        """The hosts with a process of Ray Train's workers."""
        ip_of = {n["node_id"]: n["node_ip"] for n in self.nodes()}
        number = {address: i for i, address in self.address_of.items()}
        return {number[ip_of[node]] for node in self.training_nodes() if node in ip_of}

    def cut_off(self, i: int) -> None:
        """Pull a host's cable."""
        self._run("ip", "-n", f"{self.name}h{i}", "link", "set", "eth0", "down")

    def close(self) -> None:
        for host in self.hosts.values():
            host.end()
        for name in (*(f"{self.name}h{i}" for i in self.address_of), f"{self.name}b"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextmanager
def several_hosts(workers: int) -> Iterator[Hosts]:
    """A head and so many workers of one core each."""
    refuse_without_namespaces()
    with _folders() as base:
        cluster = Hosts(base, f"ps{os.getpid()}", workers)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.close()
