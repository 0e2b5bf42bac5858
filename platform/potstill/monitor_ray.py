"""The monitor's look at a Ray cluster: nodes, what they have and use, jobs, the autoscaler.

Nobody joins the cluster, so that it sees no further driver: the head's service (port 6379) is asked, and the dashboard
where it can be reached for what the nodes' hardware does. Ray's client is another process's, as it may block for a
minute, or end the process that holds it.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.cluster import ROLE
from potstill.errors import UserError
from potstill.monitor_runs import DAY_S, Told, number, one_line

RAY_EVERY_S = 5.0
RAY_PATIENCE_S = 30.0
"""After which a cluster that does not answer is called unreachable."""
RPC_S = 5.0


class RayWatch:
    """A cluster, as the process that asks it has told last; nobody waits for it unasked."""

    def __init__(self, address: str) -> None:
        self.address = checked_address(address)
        self._process: subprocess.Popen[str] | None = None
        self._told: Told | None = None
        self._answered = threading.Event()
        self._asked: float | None = None
        self._heard = -math.inf

    def ask(self) -> None:
        """For an answer that comes later; not before the last one has come, nor too often."""
        now = time.monotonic()
        if self._asked is not None:
            if self._answered.is_set():
                self._asked = None
            elif now - self._asked > RAY_PATIENCE_S:
                self._give_up(self._overdue())
            else:
                return
        if now - self._heard < RAY_EVERY_S:
            return
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._answered.clear()
        self._asked = now
        try:
            self._process.stdin.write("look\n")
            self._process.stdin.flush()
        except OSError:
            self._give_up("the process that asks Ray has ended")

    def wait(self) -> None:
        """Until the answer is there, or overdue."""
        while self._asked is not None and not self._answered.wait(0.1):
            if time.monotonic() - self._asked > RAY_PATIENCE_S:
                self._give_up(self._overdue())

    def look(self) -> Told:
        """The newest answer."""
        self.ask()
        told = self._told or {"reason": "asking"}
        age = max(0.0, time.monotonic() - self._heard) if self._told else None
        return {**_unknown(self.address), **told, "age_s": None if age is None else round(age, 1)}

    def close(self) -> None:
        if self._process is not None:
            with suppress(OSError):
                self._process.kill()
            self._process.wait()
            self._process = None

    def _overdue(self) -> str:
        said = f"no answer from {self.address} within {RAY_PATIENCE_S:.0f} s"
        http = self.address.startswith("http")
        return said + ("" if http else "; is that the head's own port, as a rule 6379?")

    def _give_up(self, reason: str) -> None:
        self.close()
        self._asked, self._heard = None, time.monotonic()
        self._told = {"reason": reason}

    def _start(self) -> None:
        self.close()
        places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        code = "import sys; from potstill.monitor_ray import serve_ray; serve_ray(sys.argv[1])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Ray's own lines
            text=True,
            start_new_session=True,  # Ctrl-C is for us
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in places if p)},
        )
        threading.Thread(target=self._hear, args=(self._process,), daemon=True).start()

    def _hear(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError):
                told = json.loads(line)
                if process is self._process:
                    self._told, self._heard = told, time.monotonic()
                    self._answered.set()
        process.wait()  # who asks next must see that it has gone
        if process is self._process and not self._answered.is_set():
            self._told, self._heard = {"reason": "Ray's client has ended"}, time.monotonic()
            self._answered.set()


def checked_address(address: str) -> str:
    """Raises UserError for what is no address of a cluster."""
    good = address == "auto" or re.fullmatch(
        r"https?://[^/\s]+/?|[^/\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", address
    )
    if not good:
        raise UserError(
            f"--address (or RAY_ADDRESS) must be <head>:<port> (6379 as a rule), http://<dashboard>:<port> or auto, got {address!r}; leave "
            "it out, and RAY_ADDRESS unset, to watch this machine alone"
        )
    return address.rstrip("/")


def _unknown(address: str) -> Told:
    """What is told of a cluster that tells nothing."""
    return {
        "address": address,
        "reason": None,
        "version": None,
        "resources": [],
        "nodes": [],
        "dead": [],
        "jobs": [],
        "autoscaler": None,
        "hardware_reason": None,
    }


def serve_ray(address: str) -> None:
    """The process that asks: one line in, one line of JSON out."""
    answers = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    source = _Dashboard(address) if address.startswith("http") else _Gcs(address)
    for _ in sys.stdin:
        try:
            told = source.look()
        except Exception as error:  # whatever it is, it is said in one line
            told = {"reason": _why(error, address)}
        print(json.dumps(told), file=answers, flush=True)


def _why(error: BaseException, address: str) -> str:
    name, text = type(error).__name__, one_line(error, 160) or ""
    if name == "AuthenticationError" or getattr(error, "code", None) in (401, 403):
        return f"{address} wants a token, or another one: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
    return f"{text or name}"


@dataclass
class _Gcs:
    """By the head's own service (port 6379), which knows all but what the nodes' hardware does."""

    address: str
    _client: Any = None
    _at: str = ""
    _dashboard: str | None = None
    _seen: dict[str, float] = field(default_factory=dict)
    """When the autoscaler's state last was another."""

    def look(self) -> Told:
        if self._client is None:
            self._connect()
        try:
            return self._look()
        except Exception:
            self._client = None  # a head that was started anew wants a new client
            raise

    def _connect(self) -> None:
        address = self.address
        if address == "auto":
            from ray._private.services import canonicalize_bootstrap_address

            address = canonicalize_bootstrap_address("auto") or ""
            if not address:
                raise ConnectionError("no Ray cluster runs on this machine")
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=RPC_S).close()
        except OSError as error:
            raise ConnectionError(
                f"{address} cannot be reached ({error.strerror or error})"
            ) from None
        from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

        self._client, self._at = GcsClient(address), address

    def _look(self) -> Told:
        import ray
        from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # pyright: ignore[reportAttributeAccessIssue]

        client = self._client
        reply = GetClusterStatusReply()
        reply.ParseFromString(client.get_cluster_status(timeout_s=RPC_S))
        known = {
            info.node_id.hex(): info for info in client.get_all_node_info(timeout=RPC_S).values()
        }
        told = {
            **_unknown(self._at),
            **_nodes_of(reply.cluster_resource_state, known),
            "version": ray.__version__,
            "jobs": self._jobs(),
            "autoscaler": self._autoscaler(reply),
        }
        told["resources"] = _summed(node["resources"] for node in told["nodes"])
        told["hardware_reason"] = self._hardware(told["nodes"])
        return told

    def _jobs(self) -> list[Told]:
        """Those that were submitted, and other drivers that are there now."""
        client = self._client
        prefix = b"_ray_internal_job_info_"
        keys = client.internal_kv_keys(prefix, b"job", timeout=RPC_S)
        stored = client.internal_kv_multi_get(keys, b"job", timeout=RPC_S) if keys else {}
        found = []
        for key, value in stored.items():
            with suppress(ValueError):
                found.append(_job(key[len(prefix) :].decode(), json.loads(value)))
        for job in client.get_all_job_info(
            skip_submission_job_info_field=True, skip_is_running_tasks_field=True, timeout=RPC_S
        ).values():
            config = job.config
            own = config.ray_namespace.startswith("_ray_internal")
            if not job.is_dead and not own and "job_submission_id" not in config.metadata:
                about = {"status": "RUNNING", "entrypoint": job.entrypoint}
                about |= {"start_time": job.start_time or None}
                found.append({**_job(job.job_id.hex(), about), "submitted": False})
        return _chosen(found)

    def _autoscaler(self, reply: Any) -> Told:
        client = self._client
        state, cluster = reply.autoscaling_state, reply.cluster_resource_state
        newer = client.internal_kv_get(b"__autoscaler_v2_enabled", b"__autoscaler", timeout=RPC_S)
        if newer == b"1":
            return {
                "version": "v2",
                "silent_s": self._unchanged(str(state.autoscaler_state_version)),
                "launching": [
                    {"type": r.ray_node_type_name, "count": r.count, "details": None}
                    for r in state.pending_instance_requests
                ]
                + [
                    {"type": r.ray_node_type_name, "count": 1, "details": one_line(r.details, 120)}
                    for r in state.pending_instances
                ],
                "pending": _demands(
                    cluster.pending_resource_requests, cluster.pending_gang_resource_requests
                ),
                "infeasible": _demands(
                    state.infeasible_resource_requests,
                    state.infeasible_gang_resource_requests,
                ),
                "failed": [
                    {
                        "type": r.ray_node_type_name,
                        "count": r.count,
                        "reason": one_line(r.reason),
                        "time": float(r.failed_ts) or None,
                    }
                    for r in state.failed_instance_requests
                ],
            }
        text = client.internal_kv_get(b"__autoscaling_status", None, timeout=RPC_S)
        older = json.loads(text) if text else {}
        return {
            **_older_autoscaler(older),
            "version": "v1" if text else None,
            "pending": _demands(
                cluster.pending_resource_requests, cluster.pending_gang_resource_requests
            ),
        }

    def _unchanged(self, version: str) -> float | None:
        """For how long the autoscaler has said nothing: it reports every few seconds. None where it never has."""
        if version == "0":
            return None
        if version not in self._seen:
            self._seen = {version: time.monotonic()}
        return round(time.monotonic() - self._seen[version], 1)

    def _hardware(self, nodes: list[Told]) -> str | None:
        """Give each node what the dashboard knows of its hardware; returns why that was not possible."""
        if self._dashboard is None:
            found = self._client.internal_kv_get(b"dashboard", b"dashboard", timeout=RPC_S)
            self._dashboard = found.decode() if found else None
        if not self._dashboard:
            return "the cluster has no dashboard"
        host, head = self._dashboard.rpartition(":")[0], next((n for n in nodes if n["head"]), None)
        if host in ("127.0.0.1", "localhost", "::1", "[::1]") and not (head and _is_here(head)):
            return "its dashboard listens on the head alone; run the monitor there"
        try:
            summary = _ask(f"http://{self._dashboard}", "/nodes?view=summary")["data"]["summary"]
            _add_hardware(nodes, summary)
        except Exception as error:  # whatever it is, the rest stands
            self._dashboard = None
            return f"its dashboard: {_why(error, host)}"
        return None


_STATES = {"IDLE": "idle", "DRAINING": "draining"}


@dataclass
class _Dashboard:
    """By the dashboard alone, as over an SSH tunnel: nodes and jobs, but not the autoscaler."""

    address: str

    def look(self) -> Told:
        data = _ask(self.address, "/nodes?view=summary")["data"]
        nodes, dead = [], []
        for one in data["summary"]:
            raylet = one.get("raylet") or {}
            snapshot = raylet.get("stateSnapshot") or {}
            resources = _said_resources(data["nodeLogicalResources"].get(raylet.get("nodeId"), ""))
            node = {
                "id": raylet.get("nodeId") or "",
                "ip": raylet.get("nodeManagerAddress") or None,
                "host": raylet.get("nodeManagerHostname") or None,
                "head": bool(raylet.get("isHeadNode")),
                "type": _node_type(raylet.get("nodeTypeName")),
                "state": _STATES.get(str(snapshot.get("state")), "active"),
                **_labels(raylet.get("labels") or {}),
                "resources": resources,
                "hardware": None,
            }
            if raylet.get("state") == "ALIVE":
                nodes.append(node)
            elif raylet:
                ended = number(float(raylet.get("endTimeMs") or 0) / 1000) or None
                dead.append(_dead(node, raylet.get("stateMessage"), ended))
        _add_hardware(nodes, data["summary"])
        jobs = [
            _job(one.get("submission_id") or one.get("job_id") or "", one)
            | {"submitted": one.get("type") == "SUBMISSION"}
            for one in _ask(self.address, "/api/jobs/")
        ]
        return {
            **_unknown(self.address),
            "version": _ask(self.address, "/api/version").get("ray_version"),
            "resources": _summed(node["resources"] for node in nodes),
            "nodes": sorted(nodes, key=_node_order),
            "dead": _recent(dead),
            "jobs": _chosen(jobs),
        }


def _nodes_of(state: Any, known: Mapping[str, Any]) -> Told:
    from ray.core.generated.autoscaler_pb2 import NodeStatus  # pyright: ignore[reportAttributeAccessIssue]

    nodes = []
    for one in state.node_states:
        if one.status == NodeStatus.DEAD:
            continue
        info = known.get(one.node_id.hex())
        nodes.append(
            {
                "id": one.node_id.hex(),
                "ip": one.node_ip_address or None,
                "host": info.node_manager_hostname if info else None,
                "head": "node:__internal_head__" in one.total_resources,
                "type": _node_type(one.ray_node_type_name),
                "state": {NodeStatus.IDLE: "idle", NodeStatus.DRAINING: "draining"}.get(
                    one.status, "active"
                ),
                **_labels(one.labels),
                "resources": _used(one.total_resources, one.available_resources),
                "hardware": None,
            }
        )
    dead = []
    for node_id, info in known.items():
        if info.state == 1:  # GcsNodeInfo.DEAD
            node = {
                "id": node_id,
                "ip": info.node_manager_address or None,
                "host": info.node_manager_hostname or None,
                **_labels(info.labels),
            }
            dead.append(_dead(node, info.death_info.reason_message, info.end_time_ms / 1000))
    return {"nodes": sorted(nodes, key=_node_order), "dead": _recent(dead)}


def _node_order(node: Told) -> tuple[Any, ...]:
    return (not node["head"], node["role"] or "", node["ip"] or "", node["id"])


def _node_type(name: str | None) -> str | None:
    return name if name and not name.startswith("node_") else None


def _labels(labels: Mapping[str, str]) -> Told:
    kept = {k: v for k, v in sorted(labels.items()) if k != "ray.io/node-id"}
    return {"role": kept.get(ROLE), "market": kept.get("ray.io/market-type"), "labels": kept}


def _dead(node: Told, reason: str | None, ended: float | None) -> Told:
    kept = {key: node[key] for key in ("id", "ip", "host", "role")}
    return {**kept, "time": ended, "reason": one_line(reason) or None}


def _recent(dead: list[Told]) -> list[Told]:
    """Of the last hour, the newest first."""
    last = [n for n in dead if n["time"] and time.time() - n["time"] < 3600]
    return sorted(last, key=lambda n: -n["time"])[:20]


def _used(total: Mapping[str, float], available: Mapping[str, float]) -> list[Told]:
    """Without what Ray makes up: a resource for each node, and parts of those there are for each placement group."""
    return [
        {
            "name": name,
            "used": round(max(0.0, total[name] - available.get(name, 0.0)), 4),
            "total": round(total[name], 4),
        }
        for name in sorted(total, key=_resource_order)
        if not name.startswith("node:") and "_group_" not in name and name != "bundle"
    ]


def _resource_order(name: str) -> tuple[int, str]:
    first = ("CPU", "GPU", "memory", "object_store_memory")
    return (first.index(name) if name in first else len(first), name)


def _summed(every: Iterable[list[Told]]) -> list[Told]:
    total: dict[str, list[float]] = {}
    for resources in every:
        for one in resources:
            sums = total.setdefault(one["name"], [0.0, 0.0])
            sums[0], sums[1] = sums[0] + one["used"], sums[1] + one["total"]
    return [
        {"name": name, "used": round(total[name][0], 4), "total": round(total[name][1], 4)}
        for name in sorted(total, key=_resource_order)
    ]


_SAID = re.compile(r"([\d.]+)([KMGT]?i?B)?/([\d.]+)([KMGT]?i?B)? (\S+)")


def _said_resources(text: str) -> list[Told]:
    """What the dashboard says in words: `1.0/4.0 CPU`, `0B/21.00GiB memory`."""
    found = []
    for line in text.splitlines():
        if match := _SAID.match(line):
            used, unit, total, unit_of_total, name = match.groups()
            sizes = [float(used) * _unit(unit), float(total) * _unit(unit_of_total)]
            found.append({"name": name, "used": sizes[0], "total": sizes[1]})
    return sorted(found, key=lambda r: _resource_order(r["name"]))


def _unit(name: str | None) -> float:
    return 1024.0 ** " KMGT".index(name[0]) if name and name[0] in "KMGT" else 1.0


def _job(name: str, about: Mapping[str, Any]) -> Told:
    began, ended = number(about.get("start_time")), number(about.get("end_time"))
    return {
        "id": name,
        "submitted": True,
        "status": str(about.get("status") or "UNKNOWN"),
        "entrypoint": one_line(about.get("entrypoint")) or "",
        "message": one_line(about.get("message")) or None,
        "started": began / 1000 if began else None,
        "ended": ended / 1000 if ended else None,
    }


def _chosen(jobs: list[Told]) -> list[Told]:
    """Those under way, and of the last day the newest few that are not."""
    under_way = [j for j in jobs if j["status"] in ("PENDING", "RUNNING", "UNKNOWN")]
    over = [j for j in jobs if j not in under_way and time.time() - (j["ended"] or 0) < DAY_S]
    by_start = sorted(under_way, key=lambda j: -(j["started"] or math.inf))
    return by_start + sorted(over, key=lambda j: -(j["ended"] or 0))[:10]


def _demands(requests: Iterable[Any], gangs: Iterable[Any]) -> list[Told]:
    """What waits for room, each shape once: requests of tasks and actors, and groups that must come together."""
    found: dict[str, Told] = {}
    for one in requests:
        # what was counted holds the request; what cannot be met is the request itself
        shape, count = (one.request, one.count) if hasattr(one, "request") else (one, 1)
        _add_demand(found, shape, int(count), False)
    for gang in gangs:
        bundles = [r for s in gang.bundle_selectors for r in s.resource_requests]
        for shape in list(gang.requests) or bundles:
            _add_demand(found, shape, 1, True)
    return list(found.values())


def _add_demand(found: dict[str, Told], shape: Any, count: int, group: bool) -> None:
    resources = {
        name: round(shape.resources_bundle[name], 4)
        for name in sorted(shape.resources_bundle, key=_resource_order)
        if not name.startswith("bundle_group_")
    }
    labels = {}
    for selector in list(shape.label_selectors)[:1]:  # the others are fallbacks
        for rule in selector.label_constraints:
            negated = rule.operator == 2  # LABEL_OPERATOR_NOT_IN
            labels[rule.label_key] = ("not " if negated else "") + "|".join(rule.label_values)
    key = json.dumps([resources, labels, group])
    kept = found.setdefault(
        key, {"count": 0, "resources": resources, "labels": labels, "group": group}
    )
    kept["count"] += count


def _older_autoscaler(status: Mapping[str, Any]) -> Told:
    """What the first autoscaler writes down of itself; it does not tell what it can never meet."""
    report = status.get("autoscaler_report") or {}
    launching = [
        {"type": str(kind), "count": int(count), "details": None}
        for kind, count in (report.get("pending_launches") or {}).items()
    ]
    for ip, kind, state in report.get("pending_nodes") or []:
        launching.append(
            {"type": str(kind), "count": 1, "details": one_line(f"{ip}: {state}", 120)}
        )
    failed = [
        {"type": str(kind), "count": 1, "reason": f"node {ip} failed", "time": None}
        for ip, kind in report.get("failed_nodes") or []
    ]
    availability = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    for kind, about in availability.items():
        why = about.get("unavailable_node_information") or {}
        if not about.get("is_available", True):
            reason = f"{why.get('category', '')}: {why.get('description', '')}"
            when = number(about.get("last_checked_timestamp"))
            failed.append({"type": str(kind), "count": 1, "reason": one_line(reason), "time": when})
    when = number(status.get("time"))
    return {
        "silent_s": round(max(0.0, time.time() - when), 1) if when else None,
        "launching": launching,
        "infeasible": [],
        "failed": failed,
    }


def _add_hardware(nodes: list[Told], summary: Iterable[Mapping[str, Any]]) -> None:
    by_id = {(one.get("raylet") or {}).get("nodeId"): one for one in summary}
    for node in nodes:
        one = by_id.get(node["id"])
        if one is None or "mem" not in one:  # its agent has not reported yet
            continue
        total, available = one["mem"][0], one["mem"][1]
        disk = (one.get("disk") or {}).get("/") or {}
        node["hardware"] = {
            "cpu_percent": number(one.get("cpu")),
            "cores": number((one.get("cpus") or [None])[0]),
            "load_1min": number(((one.get("loadAvg") or [[None]])[0] or [None])[0]),
            "memory_used_bytes": total - available,
            "memory_total_bytes": total,
            "disk_free_bytes": number(disk.get("free")),
            # without what is kept for root
            "disk_total_bytes": number((disk.get("free") or 0) + (disk.get("used") or 0)) or None,
            "gpus": [_gpu_of_dashboard(gpu) for gpu in one.get("gpus") or []],
            "age_s": round(max(0.0, time.time() - one["now"]), 1) if one.get("now") else None,
        }


def _gpu_of_dashboard(gpu: Mapping[str, Any]) -> Told:
    power = number(gpu.get("powerMw"))
    return {
        "index": int(gpu.get("index") or 0),
        "name": one_line(gpu.get("name"), 80),
        "uuid": one_line(gpu.get("uuid"), 80),
        "utilization_percent": number(gpu.get("utilizationGpu")),
        "memory_used_bytes": int((number(gpu.get("memoryUsed")) or 0) * 2**20),
        "memory_total_bytes": int((number(gpu.get("memoryTotal")) or 0) * 2**20),
        "temperature_c": number(gpu.get("temperatureC")),
        "power_w": None if power is None else power / 1000,
        "pids": [int(p["pid"]) for p in gpu.get("processesPids") or [] if "pid" in p],
    }


def _is_here(node: Told) -> bool:
    """Whether a node is this machine."""
    import psutil

    addresses = {a.address for each in psutil.net_if_addrs().values() for a in each}
    return node["host"] == socket.gethostname() and node["ip"] in addresses


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token goes where it was sent and nowhere else."""

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        return None


def _ask(address: str, path: str) -> Any:
    """The dashboard's answer. Raises OSError and ValueError."""
    request = urllib.request.Request(f"{address}{path}")
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and (token := _token()):
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    with opener.open(request, timeout=RPC_S) as answer:
        return json.loads(answer.read())


def _token() -> str | None:
    """Where Ray's own clients look for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    with suppress(OSError):
        return Path(path).expanduser().read_text().strip()
    return None
