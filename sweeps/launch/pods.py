"""What `ray up` leaves undone on pods reached by ssh: wait for every node, start MLflow, stop the workers too.

    python -m sweeps.launch.pods up   [--config cluster.yaml] [--timeout SECONDS]     (make cluster-up)
    python -m sweeps.launch.pods down [--config cluster.yaml]                         (make cluster-down)

`wait` and `mlflow` are what these two run on the head. Exit codes: 0 done, 2 bad configuration, 1 otherwise.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sweeps.core.cells import UserError
from sweeps.core.machine import git_commit, prepare_process

PORT = 6379
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}  # how messages of nodes are read
_POLL_SECONDS = 2.0
_SAY_SECONDS = 15.0  # between progress lines while nothing changes
_MLFLOW_SECONDS = 120.0
_NAME = re.compile(r"[A-Za-z0-9][\w.:-]*")  # of a host, an address or a user; nothing that ssh or a shell would obey
_SECRET = re.compile(
    r"\b((?:\w*_)?(?:SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|PASS|KEY)(?:_\w*)?|\w+_PWD)=(?!\s|$|[\"']{2})",
    re.IGNORECASE,
)
_CONFIGURED = re.compile(r"\bconfigure\s+set\s+(\S*(?:secret|token|key)\S*)\s", re.IGNORECASE)  # of the AWS CLI
_LOGIN = re.compile(r"\b(\w[\w+.-]*)://[^/\s@]*:(?!\d+/)[^\s@]*@")  # HOST:PORT/a@b has none
_MONITOR_LOG = "/tmp/ray/session_latest/logs/monitor.log"


def _refuse_secrets(config: object, path: Path, place: str = "") -> None:
    """Raises UserError for a text of the file, a command above all, that carries a password or a key.

    Ray writes the whole configuration to files in /tmp that everyone may read, on this machine and on the head, and
    gives commands to ssh as arguments, which process lists show.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            _refuse_secrets(value, path, f"{place}.{name}".lstrip("."))
    elif isinstance(config, list):
        for number, value in enumerate(config, start=1):
            _refuse_secrets(value, path, f"{place} {number}")
    elif isinstance(config, str) and (what := _secret_in(config)):
        raise UserError(
            f"{place} in {path} {what}, which Ray would write to files in /tmp that everyone may read, and show in "
            "process lists; put keys into ~/.aws and mount that by file_mounts, or give the pods a role"
        )


def _secret_in(text: str) -> str:
    """What a text does that gives a secret away, without the secret; nothing where it does not."""
    if found := _SECRET.search(text) or _CONFIGURED.search(text):
        return f"sets {found[1]}"
    found = _LOGIN.search(text)
    return f"has a login in an address of {found[1]}" if found else ""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The parts of cluster.yaml that this file needs, checked."""

    path: Path
    head: str  # address on the cluster's network
    door: str  # address of the head from here
    workers: tuple[str, ...]
    user: str
    key: Path | None

    @staticmethod
    def read(path: Path) -> Cluster:
        """Raises UserError naming the value, the rule and the remedy."""
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            provider, auth = dict(config["provider"]), dict(config["auth"])
            head, listed, user = provider["head_ip"], provider["worker_ips"] or [], auth["ssh_user"]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read as a cluster ({type(error).__name__}: {error}); it needs provider.head_ip, "
                "provider.worker_ips and auth.ssh_user"
            ) from error
        if provider.get("type") != "local":
            raise UserError(
                f"provider.type={provider.get('type')!r} in {path}: only local is known; use `ray up` alone"
            )
        if not isinstance(listed, list):
            raise UserError(f"provider.worker_ips={listed!r} in {path} is no list; write worker_ips: [{listed}]")
        door = provider.get("external_head_ip") or head
        named = [("provider.head_ip", head), ("provider.external_head_ip", door), ("auth.ssh_user", user)]
        for name, value in [*named, *(("provider.worker_ips", w) for w in listed)]:
            if not isinstance(value, str) or not _NAME.fullmatch(value):
                raise UserError(
                    f"{name}: {value!r} in {path} is no name; write letters, digits and . : _ - alone, the first a "
                    "letter or digit"
                )
        workers = tuple(listed)
        twice = sorted({w for w in (head, *workers) if (head, *workers).count(w) > 1})
        if twice:
            raise UserError(f"{twice[0]} stands in {path} more than once; name every node once")
        _refuse_secrets(config, path)
        key = Path(auth["ssh_private_key"]).expanduser() if auth.get("ssh_private_key") else None
        if key is not None and not key.is_file():
            raise UserError(
                f"auth.ssh_private_key={auth['ssh_private_key']} in {path} is no file; name your private key"
            )
        return Cluster(path=path, head=head, door=door, workers=workers, user=user, key=key)

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.head, *self.workers)

    def ssh(self, address: str, command: str, *, through_head: bool = False) -> list[str]:
        """Command line that runs a shell command on a node, in the environment that the set-up wrote."""
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR"]
        options += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]  # as `ray up` does
        options += ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
        if self.key is not None:
            options += ["-i", str(self.key), "-o", "IdentitiesOnly=yes"]
        if through_head:
            jump = ["ssh", *options, "-W", "%h:%p", f"{self.user}@{self.door}"]
            options = [*options, "-o", f"ProxyCommand={shlex.join(jump)}"]
        whole = f"if [ -f ~/.plumbline.sh ]; then . ~/.plumbline.sh; fi; {command}"
        return ["ssh", *options, f"{self.user}@{address}", f"bash -c {shlex.quote(whole)}"]

    def on_head(self, command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.ssh(self.door, command), **_TEXT, **options)


def up(cluster: Cluster, timeout: float) -> int:
    """Start what is not running, bring code and set-up to the head, wait until every node is alive; returns exit code.

    A cluster that runs is never restarted: its sweeps go on.
    """
    reached = cluster.on_head("true", capture_output=True)
    if reached.returncode:
        raise UserError(
            f"ssh {cluster.user}@{cluster.door} does not work ({_last(reached.stderr)}); check head_ip, ssh_user and "
            f"ssh_private_key in {cluster.path}"
        )
    alive = cluster.on_head(f"ray health-check --address {cluster.head}:{PORT}", capture_output=True).returncode == 0
    ray = [str(Path(sys.executable).with_name("ray"))]
    if alive and subprocess.run([*ray, "get-head-ip", str(cluster.path)], capture_output=True).returncode:
        raise UserError(
            f"Ray runs on {cluster.door} but was not started from here (or /tmp/ray was cleaned), so `ray up` would "
            "restart it; stop it with `make cluster-down` first"
        )
    command = [*ray, "up", "--yes", *(["--no-restart"] if alive else []), str(cluster.path)]
    print(f"Ray {'already runs' if alive else 'starts'} on {cluster.head}", flush=True)
    code = subprocess.run(command, env=os.environ | {"RAY_UP_enable_autoscaler_v2": "0"}).returncode
    if code:
        print(f"`{shlex.join(command)}` ended with {code}; its messages are above", file=sys.stderr)
        return 1
    # git knows the commit here alone; the set-up removes the note whenever it installs other code
    cluster.on_head(f"echo {shlex.quote(git_commit())} > ~/plumbline/.commit")
    nodes = ",".join(cluster.nodes)
    return cluster.on_head(
        f"cd ~/plumbline && python -m sweeps.launch.pods wait --nodes {nodes} --timeout {timeout:g}"
    ).returncode


def down(cluster: Cluster) -> int:
    """Stop Ray on every node, the head first (its autoscaler would start the workers again); returns exit code."""
    stop = "command -v ray > /dev/null || exit 0; ray stop"
    head = cluster.on_head(f"{stop}; cd ~/plumbline && python -m sweeps.launch.pods mlflow --stop", capture_output=True)
    reachable = head.returncode != 255  # ssh's own failure
    print(f"{cluster.head}: {'stopped' if head.returncode == 0 else _last(head.stderr)}", flush=True)

    def stop_worker(address: str) -> bool:
        run = subprocess.run(cluster.ssh(address, stop, through_head=reachable), capture_output=True, **_TEXT)
        if run.returncode == 255 and reachable:
            run = subprocess.run(cluster.ssh(address, stop), capture_output=True, **_TEXT)
        print(f"{address}: {'stopped' if run.returncode == 0 else _last(run.stderr)}", flush=True)
        return run.returncode == 0

    with ThreadPoolExecutor(16) as pool:
        stopped = [head.returncode == 0, *pool.map(stop_worker, cluster.workers)]
    if reachable:  # Ray's own note of the cluster on this machine
        ray = str(Path(sys.executable).with_name("ray"))
        subprocess.run([ray, "down", "--yes", str(cluster.path)], capture_output=True)
    left = [node for node, ok in zip(cluster.nodes, stopped, strict=True) if not ok]
    if left:
        print(f"not stopped: {', '.join(left)}; run `make cluster-down` again when they answer", file=sys.stderr)
    return 1 if left else 0


def wait(nodes: Sequence[str], timeout: float) -> int:
    """On the head: until every node is alive, with progress lines; 1, naming the missing ones, when time is over."""
    import ray

    ray.init(address=f"{nodes[0]}:{PORT}", logging_level=logging.ERROR, log_to_driver=False)
    began, said, shown = time.monotonic(), 0.0, -1
    while True:
        alive = {n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
        missing = [node for node in nodes if _numeric(node) not in alive]
        passed = time.monotonic() - began
        if not missing:
            print(f"nodes        {len(nodes)}/{len(nodes)} alive after {passed:.0f} s", flush=True)
            return 0
        if passed > timeout:
            break
        if len(missing) != shown or passed - said > _SAY_SECONDS:
            shown, said = len(missing), passed
            found = len(nodes) - len(missing)
            print(f"nodes        {found}/{len(nodes)} alive, waiting for {', '.join(missing)}", flush=True)
        time.sleep(_POLL_SECONDS)
    print(
        f"{', '.join(missing)} did not join within {timeout:.0f} s; from the head try `ssh -i ~/ray_bootstrap_key.pem "
        f"{missing[0]}`, and read {_MONITOR_LOG} there",
        file=sys.stderr,
    )
    return 1


def _numeric(node: str) -> str:
    try:
        return socket.gethostbyname(node)
    except OSError:
        return node


def mlflow(*, stop: bool) -> int:
    """On the head: start the tracking server unless one answers, or stop the one started so; returns exit code.

    $PLUMBLINE_MLFLOW_HOST (default: loopback) is where it listens, ~/mlflow holds runs and artifacts.
    """
    folder = Path.home() / "mlflow"
    note = folder / "server.pid"
    if stop:
        if note.exists():
            pid = int(note.read_text(encoding="utf-8"))
            if "mlflow" in _command_line(pid):
                os.killpg(pid, signal.SIGTERM)
            note.unlink()
        return 0
    host = os.environ.get("PLUMBLINE_MLFLOW_HOST") or "127.0.0.1"
    if _answers(host):
        print(f"MLflow       already answers at http://{host}:5000")
        return 0
    folder.mkdir(exist_ok=True)
    command = [
        str(Path(sys.executable).with_name("mlflow")),
        "server",
        "--host",
        host,
        "--port",
        "5000",
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    with open(folder / "server.log", "ab") as log:
        popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
    note.write_text(str(popen.pid), encoding="utf-8")
    end = time.monotonic() + _MLFLOW_SECONDS
    while time.monotonic() < end and popen.poll() is None:
        if _answers(host):
            print(f"MLflow       answers at http://{host}:5000")
            return 0
        time.sleep(0.5)
    print(f"MLflow does not answer at http://{host}:5000; read {folder / 'server.log'}", file=sys.stderr)
    return 1


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""


def _answers(host: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{host}:5000/health", timeout=5):
            return True
    except OSError:
        return False


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no message"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line above; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m sweeps.launch.pods", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    for name in ("up", "down"):
        sub = commands.add_parser(name)
        sub.add_argument("--config", type=Path, default=Path("cluster.yaml"))
    commands.choices["up"].add_argument("--timeout", type=float, default=1800.0, help="seconds to wait for the nodes")
    sub = commands.add_parser("wait")
    sub.add_argument("--nodes", required=True)
    sub.add_argument("--timeout", type=float, required=True)
    commands.add_parser("mlflow").add_argument("--stop", action="store_true")
    a = p.parse_args(argv)
    try:
        prepare_process()
        if a.command == "up":
            return up(Cluster.read(a.config), a.timeout)
        if a.command == "down":
            return down(Cluster.read(a.config))
    except UserError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 2
    return wait(a.nodes.split(","), a.timeout) if a.command == "wait" else mlflow(stop=a.stop)


if __name__ == "__main__":
    sys.exit(main())
