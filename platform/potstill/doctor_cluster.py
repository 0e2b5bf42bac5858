"""What the doctor looks at in a cluster: every node, and what lies between them.

One actor on each node (they take no cores) is asked about the node, tells the time, is called by the others, reads and
writes the storage, and lets the node's own doctor look at the machine. All of it comes from nodes that are there now:
what an autoscaler may start later cannot be looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from potstill import doctor_storage
from potstill.doctor_findings import (
    FAIL,
    PASS,
    SYNC,
    WARN,
    At,
    Finding,
    Options,
    Problem,
    Steps,
    brief,
    gigabytes,
    judged,
    project,
    several,
    split_address,
)
from potstill.doctor_storage import put_and_get, why_not

CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 30.0
NODE_START_S, NODE_LOOK_S = 90.0, 150.0
LITTLE_STORE_BYTES = 256 << 20
LOGS = "see /tmp/ray/session_latest/logs"


class _Node:
    """What the doctor has on each node: an actor, sent by value, for the node may have no potstill.

    Everything in it is of the standard library, and what it is given.
    """

    def about(self, packages: list[str]) -> dict[str, Any]:
        from importlib import metadata

        versions = {}
        for name in packages:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        about = os.statvfs("/dev/shm")
        return {
            "host": socket.gethostname(),
            "called": called_by_its_name(),
            "gloo": os.environ.get("GLOO_SOCKET_IFNAME", ""),
            "python": ".".join(map(str, sys.version_info[:3])),
            "executable": sys.executable,
            "versions": versions,
            "shm_bytes": about.f_blocks * about.f_frsize,
            **fingerprint(),
        }

    def now(self) -> float:
        return time.time()

    def listen(self) -> int:
        """Accept connections from now on. Returns the port."""
        self._socket = socket.create_server(("", 0), backlog=64)

        def accept() -> None:
            while True:
                with contextlib.suppress(OSError):
                    self._socket.accept()[0].close()

        threading.Thread(target=accept, daemon=True).start()
        return self._socket.getsockname()[1]

    def reach(self, others: list[tuple[str, str, int]]) -> list[tuple[str, str]]:
        """(name, error) of those that do not answer."""
        errors = {}

        def one(name: str, host: str, port: int) -> None:
            try:
                socket.create_connection((host, port), timeout=5).close()
            except OSError as error:
                errors[name] = f"{host}:{port}: {error.strerror or error}"

        threads = [threading.Thread(target=one, args=each) for each in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(errors.items())

    def dashboard(self, port: int) -> dict[str, Any]:
        """Where it listens on this node, and what it answers to somebody without a token."""
        import ipaddress
        import urllib.error
        import urllib.request

        found = []
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError), open(f"/proc/net/{table}") as lines:
                for line in list(lines)[1:]:
                    _, local, _, state = line.split()[:4]
                    address, _, number = local.partition(":")
                    if state == "0A" and int(number, 16) == port:
                        # words of four bytes, in the order of this machine
                        raw = bytes.fromhex(address)
                        words = (raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
                        each = ipaddress.ip_address(b"".join(words))
                        found.append(getattr(each, "ipv4_mapped", None) or each)
        status = None
        if found:
            call = "127.0.0.1" if found[0].is_unspecified else found[0]
            host = f"[{call}]" if getattr(call, "version", 4) == 6 else call
            # a proxy is for the world outside
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            try:
                status = direct.open(f"http://{host}:{port}/api/jobs/", timeout=10).status
            except urllib.error.HTTPError as error:
                status = error.code
            except OSError:
                pass
        every = any(each.is_unspecified for each in found)
        return {
            "addresses": ["every interface"] if every else sorted(str(each) for each in found),
            "open": any(not each.is_loopback for each in found),
            "status": status,
        }

    def kinds(self, address: str) -> list[dict[str, Any]] | None:
        """The kinds of nodes that this head's autoscaler may start; None where its processes name no such file."""
        for folder in os.listdir("/proc"):
            if not folder.isdigit():
                continue
            try:
                with open(f"/proc/{folder}/cmdline", errors="replace") as file:
                    words = file.read().split("\0")
            except OSError:
                continue
            named = [w.partition("=")[2] for w in words if w.startswith("--autoscaling-config=")]
            if not named or f"--gcs-address={address}" not in words:
                continue
            import yaml

            with open(os.path.expanduser(named[0])) as file:
                config = yaml.safe_load(file)
            types = dict(config["available_node_types"])
            types.pop(config.get("head_node_type"), None)
            return [
                {
                    "name": name,
                    "max": kind.get("max_workers", config.get("max_workers", 0)),
                    "resources": kind.get("resources") or {},
                    "labels": kind.get("labels") or {},
                }
                for name, kind in types.items()
            ]
        return None

    def exchange(self, folder: str, token: str, mine: str) -> str:
        """Read what the driver has put into a folder, and put something there. Returns what is wrong."""
        try:
            for attempt in range(10):
                with contextlib.suppress(FileNotFoundError):
                    with open(os.path.join(folder, "driver")) as file:
                        if file.read() != token:
                            return "it has another folder under that name"
                    break
                # a network mount may remember for a while what was not there
                time.sleep(0.1 * attempt)
            else:
                return "unseen"
            with open(os.path.join(folder, mine), "w") as file:
                file.write(token)
            if not _locked(os.path.join(folder, "lock")):
                return "it can lock what is locked here: two processes could write one run"
        except OSError as error:
            return f"it may not write there ({error.strerror})"
        return ""

    def look(self, arguments: list[str], timeout_s: float) -> list[dict[str, Any]] | str:
        """The findings of this node's own doctor, or why there are none."""
        known = fingerprint()
        if "folder" not in known:
            return f"it has no potstill ({known['error']})"
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(known["folder"])}
        # a process without GPUs of its own is shown none
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        command = [sys.executable, "-P", "-m", "potstill.doctor", "--json", *arguments]
        pipe = subprocess.PIPE
        try:
            child = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        except OSError as error:
            return f"its doctor does not start ({error})"
        try:
            said, errors = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return f"its doctor was not done within {timeout_s:.0f} s"
        finally:
            child.terminate()  # it ends what it has started
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()
        try:
            return json.loads(said)["checks"]
        except (ValueError, KeyError):
            last = [line.strip() for line in errors.splitlines() if line.strip()][-1:]
            return f"its doctor has failed ({''.join(last)[:200] or f'status {child.returncode}'})"

    def bucket(self, uri: str, folder: str, token: str) -> tuple[str, str] | None:
        """Put, list, read and delete an object. Returns what it was at, and the error, if there is one."""
        import pyarrow.fs

        doing = "opening it"
        try:
            filesystem = pyarrow.fs.FileSystem.from_uri(uri)[0]
            for doing in put_and_get(filesystem, folder, token):  # noqa: B007
                pass
        except (OSError, ValueError) as error:
            return doing, str(error)
        return None


def _locked(path: str) -> bool:
    """Whether another process, on whichever host, has locked a file."""
    with open(path, "rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def called_by_its_name() -> str:
    """The address of its own that a host's name stands for, or why it stands for none: where Gloo is called."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError as error:
        return f"none of its own ({error.strerror or error})"
    return address


def fingerprint() -> dict[str, str]:
    """The folder of the potstill that an import finds, and a hash of its sources; or why there is none."""
    import hashlib
    import importlib.util

    try:
        spec = importlib.util.find_spec("potstill")
        folder = next(iter(spec.submodule_search_locations or ())) if spec else None
    except (ImportError, ValueError) as error:
        return {"error": str(error)}
    if folder is None or not os.path.exists(os.path.join(folder, "__init__.py")):
        return {"error": "it does not import"}  # an empty folder would
    digest = hashlib.sha256()
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(root, name)
                digest.update(os.path.relpath(path, folder).encode() + b"\0")
                with open(path, "rb") as file:
                    digest.update(file.read() + b"\0")
    return {"folder": os.path.abspath(folder), "code": digest.hexdigest()[:12]}


def clock_offset(
    ask: Callable[[], float], now: Callable[[], float], trips: int = 7
) -> tuple[float, float]:
    """How far another clock is ahead of ours, and by how much that may be wrong, in seconds.

    As NTP does it: the other answers somewhere between question and answer, and the fastest of several round trips
    leaves the least room.
    """
    best = (0.0, float("inf"))
    for _ in range(trips):
        before = now()
        theirs = ask()
        after = now()
        if (after - before) / 2 < best[1]:
            best = (theirs - (before + after) / 2, (after - before) / 2)
    return best


def join_and_look(options: Options) -> Steps:
    address = options.address
    if not address:
        return
    values = {"address": address}
    check = "check --address or RAY_ADDRESS (host:port of the head, port 6379), that the head runs (`ray status` there), and the firewall"
    if address == "auto":
        yield At("reach", "looking for the Ray of this machine", check)
        address = _ray_of_this_machine()
        if address is None:
            said = "no Ray runs on this machine that auto could stand for"
            yield judged("reach", "", [(FAIL, said, check)], values)
            return
        options = dataclasses.replace(options, address=address)
    yield At("reach", f"calling {address}", check)
    try:
        socket.create_connection(split_address(address), timeout=5).close()
    except (OSError, UnicodeError) as error:  # the second one of names that are none
        said = f"{address} does not answer ({getattr(error, 'strerror', None) or error})"
        yield judged("reach", "", [(FAIL, said, check)], values)
        return
    yield At("reach", f"joining {address}", LOGS)
    os.environ["RAY_ADDRESS"] = address
    began = time.monotonic()
    try:
        from potstill.cluster import start_ray

        _ask_head(address)
        start_ray()
    except Exception as error:
        yield judged("reach", "", [_why_not_joined(address, error)], values)
        return
    import ray

    try:
        yield from look_over(options, time.monotonic() - began)
    finally:
        ray.shutdown()


def _ray_of_this_machine() -> str | None:
    from ray._private.services import canonicalize_bootstrap_address

    os.environ.pop("RAY_ADDRESS", None)
    with contextlib.suppress(ConnectionError):
        return canonicalize_bootstrap_address("auto")
    return None


def _ask_head(address: str) -> None:
    """Raises what is wrong with the token, or with who answers there, or ConnectionError where this is no node of it:
    joining tries for long, says neither, and in the end takes the process down."""
    import ray._raylet

    raylet: Any = ray._raylet
    nodes = raylet.GcsClient(address=address).get_all_node_info(timeout=15).values()
    if not any(os.path.exists(node.raylet_socket_name) for node in nodes):
        raise ConnectionError("no raylet of it runs here")


def _why_not_joined(address: str, error: Exception) -> Problem:
    text = brief(error, 400)
    lower = text.lower()
    if isinstance(error, ImportError):
        return FAIL, f"this Python cannot join a cluster ({text})", SYNC
    if "token" in lower or "auth" in lower:
        remedy = "copy the head's ~/.ray/auth_token here (chmod 600), and export RAY_AUTH_MODE=token on both sides"
        said = text.partition(". Ensure")[0].partition(". Note")[0]
        return FAIL, f"{address} refuses this token ({said})", remedy
    if "mismatch" in lower:
        remedy = "use the head's Python and packages: run this by `ray job submit`, or uv sync on both sides"
        return FAIL, f"{address} has other versions ({text})", remedy
    if "timed out while waiting for gcs" in lower:
        remedy = "check the port (6379, or what `ray start --head --port` was given), and that the head is not overloaded"
        return FAIL, f"{address} answers, but not as the head of a Ray", remedy
    if isinstance(error, ConnectionError) and "no raylet" in lower:
        remedy = "run it on the head: ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env runtime_env.yaml -- python jobs/doctor.py"
        return FAIL, f"this machine is no node of {address}", remedy
    return FAIL, f"{address} cannot be joined ({text})", f"on the head, {LOGS}"


def look_over(options: Options, joined_s: float) -> Steps:
    """The cluster that this process has joined."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from potstill.cluster import alive_nodes

    nodes = {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        + (f" {node['NodeID'][:6]}" if _twice(node) else ""): node
        for node in alive_nodes()
    }
    total = ray.cluster_resources()
    values = {"address": options.address, "nodes": list(nodes), "resources": total}
    said = (
        f"{options.address or 'Ray'}: {several(len(nodes), 'node')}, "
        f"{several(int(total.get('CPU', 0)), 'CPU')}, {several(int(total.get('GPU', 0)), 'GPU')}, joined in {joined_s:.1f} s"
    )
    yield judged("reach", said, [], values)

    yield At("nodes", "starting a process on each node")
    kind = ray.remote(_by_value())
    actors = {}
    for name, node in nodes.items():
        place: Any = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options_of = kind.options(num_cpus=0, scheduling_strategy=place, max_concurrency=2)
        actors[name] = options_of.remote()
    try:
        yield from _look_at_nodes(options, nodes, actors)
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _twice(node: Mapping[str, Any]) -> bool:
    """Whether another node has its name and address, as on one machine that plays several."""
    from potstill.cluster import alive_nodes

    keys = ("NodeManagerHostname", "NodeManagerAddress")
    return sum(all(other[k] == node[k] for k in keys) for other in alive_nodes()) > 1


def _by_value() -> Any:
    """_Node, pickled with its code: a node may have no potstill, or another one."""
    from ray import cloudpickle

    for module in (sys.modules[__name__], doctor_storage):
        cloudpickle.register_pickle_by_value(module)
    return _Node


def _answers(calls: Mapping[str, Any], timeout_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """What came within the time, and why the rest did not, by node."""
    import ray

    references = {reference: name for name, reference in calls.items()}
    if not references:
        return {}, {}
    ready, _ = ray.wait(list(references), num_returns=len(references), timeout=timeout_s)
    came: dict[str, Any] = {}
    failed = dict.fromkeys(calls, f"no answer within {timeout_s:.0f} s")
    for reference in ready:
        name = references[reference]
        try:
            came[name] = ray.get(reference)
            del failed[name]
        except Exception as error:
            failed[name] = brief(error)
    return {name: came[name] for name in calls if name in came}, failed


def _look_at_nodes(options: Options, nodes: dict[str, Any], actors: dict[str, Any]) -> Steps:
    packages = [re.split(r"[^\w.-]", each, maxsplit=1)[0] for each in project()[1]]
    about, failed = _answers(
        {name: actor.about.remote(packages) for name, actor in actors.items()}, NODE_START_S
    )
    remedy = f"{LOGS} there (runtime_env_setup*.log, raylet.err)"
    for name, why in failed.items():
        yield judged(
            "nodes", "", [(FAIL, f"{name} starts no process: {why}", remedy)], {"node": name}
        )
    nodes = {name: node for name, node in nodes.items() if name in about}
    actors = {name: actor for name, actor in actors.items() if name in about}
    checks: dict[str, tuple[str, Callable[[], Iterable[Finding]]]] = {
        "versions": ("comparing versions", lambda: [_versions(about)]),
        "code": ("comparing potstill", lambda: [_code(about)]),
        "roles": (
            "looking for an autoscaler",
            lambda: [_roles(options, nodes, *_autoscaler(nodes, actors))],
        ),
        "clocks": ("asking for the time", lambda: [_asked_for_the_time(actors)]),
        "network": (
            "letting the nodes call each other",
            lambda: [_network(nodes, actors, about)],
        ),
        "dashboard": ("asking it without a token", lambda: _dashboard(nodes, actors)),
        "object-store": ("reading its size", lambda: [_object_store(nodes, about)]),
        **{
            f"{kind}-seen": (
                "letting the nodes read and write",
                lambda kind=kind: [_seen(kind, options, nodes, actors)],
            )
            for kind in ("runs", "cache")
        },
        "nodes": ("letting each node look at itself", lambda: _machines(options, nodes, actors)),
    }
    for name, (doing, look) in checks.items():
        if options.wants(name):
            yield At(name, doing, LOGS)
            try:
                yield from look()
            except (
                Exception
            ) as error:  # a node or the head that goes meanwhile; the others are there
                yield judged(name, "", [(FAIL, f"{doing}: {brief(error)}", f"on the head, {LOGS}")])


def _grouped(values: Mapping[str, Any]) -> str:
    """`3.11.4 on 2 nodes, 3.12.1 on h3 (10.0.0.3)`."""
    names: dict[Any, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    most = sorted(names.items(), key=lambda item: -len(item[1]))
    return ", ".join(
        f"{value} on {who[0] if len(who) == 1 else f'{len(who)} nodes'}" for value, who in most
    )


def _versions(about: Mapping[str, Any]) -> Finding:
    import platform
    from importlib import metadata

    problems: list[Problem] = []
    remedy = "give every node the same image, or set it up by the same uv.lock (uv sync)"
    pythons = {name: each["python"] for name, each in about.items()}
    mine = platform.python_version()
    minors = {version.rpartition(".")[0] for version in [mine, *pythons.values()]}
    if len({mine, *pythons.values()}) > 1:
        said = f"Python differs: {mine} here, {_grouped(pythons)}"
        problems.append((FAIL if len(minors) > 1 else WARN, said, remedy))
    # others may differ without changing what is computed, or how it is sent
    strict = {"ray", "torch", "timm", "torchvision", "safetensors"}
    every = {package for each in about.values() for package in each["versions"]}
    for package in sorted(every):
        try:
            own = metadata.version(package)
        except metadata.PackageNotFoundError:
            own = "none"
        there = {name: each["versions"].get(package, "none") for name, each in about.items()}
        # what is built for another CUDA, or for none, is the same otherwise
        plain = {version.partition("+")[0] for version in [own, *there.values()]}
        if len(plain) > 1:
            said = f"{package} differs: {own} here, {_grouped(there)}"
            problems.append((FAIL if package in strict else WARN, said, remedy))
    first = next(iter(about.values()), {"versions": {}})["versions"]
    shown = ", ".join(f"{p} {first[p]}" for p in ("ray", "torch", "timm") if p in first)
    fine = f"Python {mine}, {shown} on {several(len(about), 'node')}" if not problems else ""
    values = {name: {"python": e["python"], **e["versions"]} for name, e in about.items()}
    return judged("versions", fine, problems, values)


def _code(about: Mapping[str, Any]) -> Finding:
    mine = fingerprint()
    problems: list[Problem] = []
    missing = {name: each["error"] for name, each in about.items() if "error" in each}
    deliver = "send the code with the job: ray job submit … --working-dir . --runtime-env runtime_env.yaml -- python jobs/…"
    for name, why in missing.items():
        problems.append((FAIL, f"{name} has no potstill ({why})", deliver))
    others = {n: e.get("code") for n, e in about.items() if e.get("code") != mine.get("code")}
    for name in others.keys() - missing.keys():
        said = f"{name} has another potstill ({others[name]} in {about[name]['folder']}; here {mine.get('code')})"
        problems.append((FAIL, said, f"{deliver}, or install the same commit there"))
    fine = f"potstill {mine.get('code')} on {several(len(about), 'node')}" if not problems else ""
    values = {
        name: {k: e[k] for k in ("folder", "code", "error") if k in e} for name, e in about.items()
    }
    return judged("code", fine, sorted(problems), {"here": mine, **values})


def _is_head(node: Mapping[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]


def _autoscaler(
    nodes: Mapping[str, Any], actors: Mapping[str, Any]
) -> tuple[bool | None, list[dict[str, Any]]]:
    """Whether one is at work (None: it cannot be told), and the kinds of nodes that it may start, where they are seen:
    the head's processes name the file; Kubernetes has it in another container."""
    import ray
    import ray._private.worker
    from ray.core.generated import autoscaler_pb2

    address = ray.get_runtime_context().gcs_address
    heads = [name for name, node in nodes.items() if _is_head(node)]
    came, _ = _answers({name: actors[name].kinds.remote(address) for name in heads}, 30)
    if any(kinds is not None for kinds in came.values()):
        return True, [kind for kinds in came.values() for kind in kinds or ()]
    # without one a head's monitor says nothing here, unless it was set to do as the newer autoscaler does
    proto: Any = autoscaler_pb2
    reply = proto.GetClusterStatusReply()
    worker: Any = ray._private.worker.global_worker
    reply.ParseFromString(worker.gcs_client.get_cluster_status(timeout_s=10))
    return (None if reply.autoscaling_state.autoscaler_state_version else False), []


def _roles(
    options: Options, nodes: Mapping[str, Any], scales: bool | None, kinds: list[dict[str, Any]]
) -> Finding:
    """`scales` and `kinds`: see _autoscaler."""
    from potstill.cluster import ROLE, ROLES

    roles = {name: node["Labels"].get(ROLE) for name, node in nodes.items()}
    problems: list[Problem] = []
    # where its kinds are not seen, it may start what is missing
    absent = FAIL if scales is False or kinds else WARN
    to_start = {kind["labels"].get(ROLE) for kind in kinds}
    if any(roles.values()):
        for name, role in roles.items():
            if not role:
                said = f"{name} has no {ROLE}: no work goes there"
                problems.append((WARN, said, f"ray start --labels {ROLE}=data (or train)"))
            elif role not in ROLES:
                said = f"{name} has {ROLE}={role}, which is none"
                problems.append((FAIL, said, f"ray start --labels {ROLE}=head|data|train"))
        for role in ("data", "train"):
            needed = role == "data" or options.gpus != 0
            if needed and role not in {*roles.values(), *to_start}:
                said = f"no node has {ROLE}={role}: such work would wait for ever"
                remedy = f"ray start --labels {ROLE}={role} on some node"
                if kinds:
                    remedy = f"give a kind of nodes of the autoscaler labels: {{{ROLE}: {role}}}"
                problems.append((absent, said, remedy))
    elif len(nodes) > 1 or kinds:
        said = f"no node has a {ROLE}: data and training go to any node"
        remedy = "label the nodes as cluster.yaml does, so that work of one kind starts no others"
        problems.append((WARN, said, remedy))
    for name, node in nodes.items():
        cores = int(node["Resources"].get("CPU", 0))
        if _is_head(node) and cores and (len(nodes) > 1 or kinds):
            said = f"the head, {name}, takes work of its own ({several(cores, 'CPU')})"
            problems.append((WARN, said, "ray start --head --num-cpus=0"))
    gpus = sum(node["Resources"].get("GPU", 0) for node in nodes.values())
    to_come = sum(kind["resources"].get("GPU", 0) * kind["max"] for kind in kinds)
    if options.gpus and gpus < options.gpus:
        said = f"{gpus:g} of {options.gpus} GPUs are there"
        if to_come >= options.gpus:
            problems.append((PASS, f"{said}, and the autoscaler starts up to {to_come:g}", ""))
        else:
            said += f", and the autoscaler starts up to {to_come:g}" if kinds else ""
            remedy = "add GPU nodes (max_workers of their kind), or check that they say what they have (ray start --num-gpus)"
            # a provider may know what a kind has, and its file not say it
            problems.append((FAIL if scales is False or to_come else WARN, said, remedy))
    counts = {role: list(roles.values()).count(role) for role in dict.fromkeys(roles.values())}
    shown = ", ".join(f"{count} {role or 'without role'}" for role, count in counts.items())
    more = ", ".join(f"{kind['name']} (up to {kind['max']})" for kind in kinds)
    unseen = "; an autoscaler may be at work" if scales is None else ""
    measured = shown + (f"; the autoscaler starts {more}" if more else unseen)
    values = {"roles": roles, "gpus": gpus, "autoscaler": scales, "kinds": kinds}
    return judged("roles", measured, problems, values)


def _asked_for_the_time(actors: Mapping[str, Any]) -> Finding:
    import ray

    def ask_of(actor: Any) -> Callable[[], float]:
        return lambda: ray.get(actor.now.remote(), timeout=10)

    return clocks({name: ask_of(actor) for name, actor in actors.items()})


def clocks(asks: Mapping[str, Callable[[], float]]) -> Finding:
    """`asks`: what asks each node for its time."""
    offsets: dict[str, float] = {}
    problems: list[Problem] = []
    remedy = "let chrony or systemd-timesyncd set the clock there (timedatectl)"
    worst = 0.0
    for name, ask in asks.items():
        try:
            offset, unsure = clock_offset(ask, time.time)
        except Exception as error:  # it has gone, or has more to do
            said = f"{name} does not tell the time ({brief(error, 100)})"
            problems.append((FAIL, said, f"{LOGS} there"))
            continue
        offsets[name] = round(offset, 4)
        worst = max(worst, unsure)
        sure = abs(offset) - unsure
        said = f"{name} is {abs(offset):.1f} s {'ahead' if offset > 0 else 'behind'}"
        if sure > CLOCK_FAIL_S:
            why = "above 15 min S3 refuses requests" if sure < 900 else "S3 refuses its requests"
            problems.append((FAIL, f"{said}: {why}", remedy))
        elif sure > CLOCK_WARN_S:
            problems.append((WARN, f"{said}: records of two nodes seem out of order", remedy))
    largest = max(map(abs, offsets.values()), default=0.0)
    fine = f"within {largest * 1000:.0f} ms of this one's (± {worst * 1000:.0f} ms)"
    return judged("clocks", "" if problems else fine, problems, {"offsets_s": offsets})


def _network(
    nodes: Mapping[str, Any], actors: Mapping[str, Any], about: Mapping[str, Any]
) -> Finding:
    if len(nodes) < 2:
        return judged("network", "one node", [])
    ports, failed = _answers({name: actor.listen.remote() for name, actor in actors.items()}, 30)
    names = list(ports)
    calls = {}
    for at, name in enumerate(names):
        # all of a few, of many the next ones in a circle
        others = (names[at + 1 :] + names[:at])[:16]
        targets = [(n, nodes[n]["NodeManagerAddress"], ports[n]) for n in others]
        calls[name] = actors[name].reach.remote(targets)
    came, silent = _answers(calls, 60)
    problems: list[Problem] = []
    remedy = "open all TCP ports between the nodes: Ray's workers, Gloo and NCCL take any"
    for name, errors in came.items():
        for other, error in errors:
            problems.append((FAIL, f"{name} does not reach {other} at {error}", remedy))
    problems += [(FAIL, f"{name}: {why}", remedy) for name, why in {**failed, **silent}.items()]
    if len(problems) > 4:
        problems = [*problems[:4], (FAIL, f"{len(problems) - 4} further pairs", remedy)]
    if len({node["NodeManagerAddress"] for node in nodes.values()}) > 1:
        problems += _unknown_to_gloo(about)
    pairs = len(names) * min(16, len(names) - 1)
    fine = f"{pairs} connections between the nodes" if not problems else ""
    return judged("network", fine, problems)


def _unknown_to_gloo(about: Mapping[str, Any]) -> list[Problem]:
    """Of several hosts, those whose name is not their address to the others: there Gloo takes 127.0.0.1."""
    problems = []
    for name, each in about.items():
        if each["gloo"] or not each["called"].startswith(("127.", "none")):
            continue
        said = f"{name} takes its own name for {each['called']}: Gloo would call itself, and training on CPUs of several hosts hang"
        remedy = "give the name its address in /etc/hosts there, and none of 127.*, or set GLOO_SOCKET_IFNAME=<interface> in runtime_env.yaml"
        problems.append((WARN, said, remedy))
    return problems


def _dashboard(nodes: Mapping[str, Any], actors: Mapping[str, Any]) -> Iterator[Finding]:
    import ray
    import ray._private.worker

    url = ray._private.worker.get_dashboard_url()
    head = next((name for name, node in nodes.items() if _is_head(node)), None)
    if not url or head is None:
        yield judged("dashboard", "none: ray job submit has nothing to talk to", [])
        return
    port = int(url.rpartition(":")[2])
    came, failed = _answers({head: actors[head].dashboard.remote(port)}, 30)
    if failed or not came[head]["addresses"]:
        yield judged("dashboard", f"{url}: its port is not seen from the head's processes", [])
        return
    yield _judged_dashboard(port, came[head])


def _judged_dashboard(port: int, seen: Mapping[str, Any]) -> Finding:
    """`seen`: see _Node.dashboard."""
    where = ", ".join(seen["addresses"]) if seen["open"] else "loopback only"
    problems: list[Problem] = []
    if seen["status"] is None:
        asks = "answers nothing"
        problems.append((WARN, "jobs cannot be submitted", f"{LOGS}/dashboard.log on the head"))
    elif seen["status"] in (401, 403):
        asks = "asks for the token"
    else:
        asks = "asks for no token"
        token = "export RAY_AUTH_MODE=token before `ray start`, on every node"
        if seen["open"]:
            said = "whoever reaches it may run anything on the cluster"
            problems.append((WARN, said, f"{token}, and give the head --dashboard-host=127.0.0.1"))
        elif os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
            said = "this side has one, and the cluster was started without: whoever reaches another of its ports may run anything on it"
            problems.append((WARN, said, token))
    return judged("dashboard", f"port {port} on {where}, {asks}", problems, dict(seen))


def _object_store(nodes: Mapping[str, Any], about: Mapping[str, Any]) -> Finding:
    sizes = {name: node["Resources"].get("object_store_memory", 0) for name, node in nodes.items()}
    problems: list[Problem] = []
    for name, size in sizes.items():
        shm = about[name]["shm_bytes"]
        if size > shm:
            said = f"{name}: {gigabytes(size)} of objects do not fit its /dev/shm of {gigabytes(shm)}: Ray keeps them on disk, slowly"
            remedy = "give its container more (docker run --shm-size=…), or ray start --object-store-memory=…"
            problems.append((WARN, said, remedy))
        elif size < LITTLE_STORE_BYTES:
            said = f"{name}: {gigabytes(size)} for objects is little: Ray Data spills to disk"
            problems.append((WARN, said, "ray start --object-store-memory=1000000000"))
    low, high = min(sizes.values(), default=0), max(sizes.values(), default=0)
    fine = gigabytes(low) if low == high else f"{gigabytes(low)} to {gigabytes(high)}"
    return judged("object-store", "" if problems else f"{fine} a node", problems, sizes)


def _seen(
    kind: str, options: Options, nodes: Mapping[str, Any], actors: Mapping[str, Any]
) -> Finding:
    from potstill.storage import is_uri, local_folder

    text = getattr(options, kind)
    if is_uri(text):
        from potstill.data.files import locate

        place = locate(text, f"--{kind}")
        if not place.local:
            return _bucket_seen(f"{kind}-seen", place, actors)
    return _folder_seen(kind, local_folder(text, f"--{kind}"), nodes, actors)


def _bucket_seen(name: str, place: Any, actors: Mapping[str, Any]) -> Finding:
    bucket, query = place.path.partition("/")[0], place.options
    if place.scheme == "gs" and "retry_limit_seconds=" not in query:
        query += f"{'&' if query else ''}retry_limit_seconds=10"
    user = f"{place.user}@" if place.user else ""
    uri = f"{place.scheme}://{user}{bucket}{'?' if query else ''}{query}"
    calls = {n: a.bucket.remote(uri, place.path, uuid.uuid4().hex) for n, a in actors.items()}
    came, failed = _answers(calls, 60)
    problems = [(FAIL, f"{node}: {why}", f"{LOGS} there") for node, why in failed.items()]
    for node, found in came.items():
        if found is not None:
            said, remedy = why_not(place, found[0], OSError(found[1]))
            where = "on every node (env_vars of runtime_env.yaml, or its role)"
            problems.append((FAIL, f"{node}: {said}", f"{remedy} {where}"))
    fine = f"{place} from {several(len(came), 'node')}: put, listed, read, deleted"
    return judged(name, "" if problems else fine, problems)


def _folder_seen(
    kind: str, folder: Path, nodes: Mapping[str, Any], actors: Mapping[str, Any]
) -> Finding:
    name = f"{kind}-seen"
    made = [f for f in (folder, *folder.parents) if not os.path.lexists(f)]
    scratch = folder / f".potstill-doctor-{uuid.uuid4().hex[:12]}"
    token = uuid.uuid4().hex
    files = {node: f"node-{at}" for at, node in enumerate(nodes)}
    try:
        try:
            scratch.mkdir(parents=True)
            scratch.chmod(0o777)
            (scratch / "driver").write_text(token)
        except OSError as error:
            said = f"{folder} cannot be written here ({error.strerror})"
            return judged(name, "", [(FAIL, said, f"see the line of {kind}")])
        with open(scratch / "lock", "w") as lock:
            os.fchmod(lock.fileno(), 0o666)
            fcntl.flock(lock, fcntl.LOCK_EX)
            calls = {n: actors[n].exchange.remote(str(scratch), token, files[n]) for n in nodes}
            came, failed = _answers(calls, 30)
        for node, file in files.items():
            if came.get(node) == "" and not _appears(scratch / file, token):
                came[node] = "what it writes there is not seen here"
    except OSError as error:
        said = f"{folder} cannot be locked here ({error.strerror})"
        return judged(name, "", [(FAIL, said, f"see the line of {kind}")])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for each in made:  # the doctor leaves nothing behind
            with contextlib.suppress(OSError):
                each.rmdir()
    problems: list[Problem] = [
        (FAIL, f"{node}: {why}", f"look after the mount of {folder} there")
        for node, why in failed.items()
    ]
    unseen = [node for node, why in came.items() if why == "unseen"]
    share = f"a shared mount at {folder} on every node, or {kind}.dir=s3://…"
    for node, why in came.items():
        if why and why != "unseen":
            problems.append((FAIL, f"{node}: {why}", share))
    if unseen:
        which = f"not seen by {', '.join(unseen[:4])}{', …' if len(unseen) > 4 else ''}"
        if kind == "runs":
            said = f"{which}, whose workers send what belongs there to this node"
            problems.append((PASS, said, ""))
        else:
            said = f"{which}: each fetches a copy of a set from this node, and keeps it in cache.local_dir"
            problems.append((WARN, said, f"{share}; else give cache.local_dir room on every node"))
    both = [node for node, why in came.items() if not why]
    measured = f"{folder}: read and written by {len(both)} of {several(len(nodes), 'node')}"
    return judged(name, measured, problems, {"folder": str(folder), "unseen": unseen})


def _appears(path: Path, token: str) -> bool:
    for attempt in range(10):
        with contextlib.suppress(OSError):
            if path.read_text() == token:
                return True
        time.sleep(0.1 * attempt)
    return False


# what a node's own doctor is asked
_OF_NODES = (
    "python", "packages", "driver", "gpus", "imports", "cuda", "memory", "shared-memory", "open-files", "processes",
    "temp", "local-cache",
)  # fmt: skip


def _machines(
    options: Options, nodes: Mapping[str, Any], actors: Mapping[str, Any]
) -> Iterator[Finding]:
    calls = {}
    for name, node in nodes.items():
        arguments = ["--node", "--only", ",".join(_OF_NODES)]
        arguments += ["--gpus", f"{node['Resources'].get('GPU', 0):.0f}"]
        if options.local_cache:
            arguments += ["--local-cache", options.local_cache]
        if options.need_gb is not None:
            arguments += ["--need-gb", str(options.need_gb)]
        calls[name] = actors[name].look.remote(arguments, NODE_LOOK_S)
    came, failed = _answers(calls, NODE_LOOK_S + 10)
    fine, checked = [], 0
    for name, findings in came.items():
        if isinstance(findings, str):
            failed[name] = findings
            continue
        bad = [f for f in findings if f["status"] in (WARN, FAIL)]
        checked = max(checked, len({f["name"] for f in findings}))
        fine += [] if bad else [name]
        for each in bad:
            said = f"{name}: {each['name']}: {each['found']}"
            values = {"node": name, "check": each["name"], **each["values"]}
            yield Finding("nodes", each["status"], said, tuple(each["remedies"]), values)
    for name, why in failed.items():
        remedy = "see the line of code" if "potstill" in why else f"{LOGS} there"
        problem = (FAIL, f"{name} was not looked at: {why}", remedy)
        yield judged("nodes", "", [problem], {"node": name})
    if fine:
        said = f"{checked} checks of this machine's kind on {fine[0] if len(fine) == 1 else f'{len(fine)} nodes'}"
        yield judged("nodes", said, [], {"fine": fine})
