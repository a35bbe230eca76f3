"""Machines made of namespaces: a user's desk and pods with ssh, on their own network.

Each machine has its own network, mounts, processes, host name and IPC. All of them live inside the desk's process
namespace, which dies with the test process (also by kill -9), and with it every process, mount, link and socket.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("namespaces.sh")
TOOLS = ("unshare", "nsenter", "setpriv", "ip", "mount", "ssh", "ssh-keygen", "rsync", "make")
SSHD = "/usr/sbin/sshd"
DESK = "10.77.0.1"
HOME = "/mnt/home"  # of every machine
SHARED = "/mnt/shared"  # the folder that all nodes mount
_BOOT_SECONDS = 30.0


def missing_for_rig() -> str:
    """Why the rig cannot be built here, or an empty text."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "the rig needs root on Linux"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None] + ([] if Path(SSHD).exists() else ["sshd"])
    if absent:
        return f"the rig needs {', '.join(absent)} (apt-get install openssh-server iproute2 rsync)"
    test = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc", "ip", "link"],
        capture_output=True,
        text=True,
    )
    return "" if test.returncode == 0 else f"namespaces are not allowed here ({test.stderr.strip()})"


def wait_for(what: str, ready: Callable[[], Any], seconds: float, every: float = 0.2) -> Any:
    """The first true value of `ready`; AssertionError naming `what` when there is none in time."""
    end = time.monotonic() + seconds
    while True:
        if value := ready():
            return value
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(every)


class Machine:
    """One set of namespaces; `popen` is its outermost process, `pid` its init as the test sees it."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes]) -> None:
        self.name, self.popen = name, popen
        self.pid: int = wait_for(f"init of {name}", self._find_init, _BOOT_SECONDS)

    def _find_init(self) -> int | None:
        assert self.popen.poll() is None, f"{self.name} ended with {self.popen.returncode}"
        for process in psutil.Process(self.popen.pid).children(recursive=True):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                continue
            levels = next(line for line in status.splitlines() if line.startswith("NSpid")).split()[1:]
            if levels[-1] == "1":
                return process.pid
        return None

    def enter(self) -> list[str]:
        """Prefix of a command line that runs inside."""
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", "--uts", "--ipc", "--"]


class Rig:
    """A desk and pods `head`, `w1`, `w2`, ... at 10.77.0.11 and up; use as a context manager."""

    def __init__(self, folder: Path, workers: int = 2) -> None:
        self.folder = folder
        self.names = ["head", *(f"w{i + 1}" for i in range(workers))]
        self.address = {name: f"10.77.0.{11 + i}" for i, name in enumerate(self.names)}
        self.shared = folder / "shared"
        self.machines: dict[str, Machine] = {}
        self._background: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Rig:
        try:
            self._prepare()
            self.machines["desk"] = self._start("operator", "desk", [])
            self.check("test -e /run/ready || { sleep 1; test -e /run/ready; }")
            for name in self.names:
                self.boot(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        desk = self.machines.pop("desk", None)
        if desk is not None:
            os.kill(desk.pid, signal.SIGKILL)  # its process namespace contains all the others
            desk.popen.wait()
        for popen in [*self._background, *(m.popen for m in self.machines.values())]:
            popen.kill()
            popen.wait()
        self.machines.clear()

    def _prepare(self) -> None:
        for name in ("desk", *self.names):
            (self.folder / name / "home").mkdir(parents=True)
        self.shared.mkdir()
        for name in ("id", "host_key"):
            key = str(self.folder / name)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        (self.folder / "passwd").write_text(
            f"root:x:0:0:root:{HOME}:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        )
        (self.folder / "shadow").write_text("root:*:20000:0:99999:7:::\n")
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder / 'host_key'}\nAuthorizedKeysFile {HOME}/.ssh/authorized_keys\nPidFile none\n"
            "StrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\n"
            "Subsystem sftp internal-sftp\n"
        )
        for name in self.names:
            home = self.folder / name / "home"
            (home / ".ssh").mkdir()
            shutil.copy(self.folder / "id.pub", home / ".ssh" / "authorized_keys")
            # Debian's file: what follows the return is not read by a shell without a terminal
            (home / ".bashrc").write_text("case $- in *i*) ;; *) return;; esac\n")
            self._furnish(home)

    def _furnish(self, home: Path) -> None:
        """Provide the environment that `make venv` would build: this test's own, read-only."""
        venv = home / "plumbline" / ".venv"
        venv.mkdir(parents=True)
        for entry in Path(sys.prefix).iterdir():
            if entry.name != ".ready":
                (venv / entry.name).symlink_to(f"/mnt/venv/{entry.name}")
        (venv / ".ready").touch()

    def _start(self, role: str, name: str, arguments: Sequence[str]) -> Machine:
        flags = ["--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        script = ["sh", str(SCRIPT), role, name, str(self.folder), *arguments]
        if role == "operator":
            command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", *flags, *script]
        else:
            command = [*self.machines["desk"].enter(), "ip", "netns", "exec", name, "unshare", *flags, *script]
        with open(self.folder / f"{name}.log", "ab") as log:
            popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_plain())
        return Machine(name, popen)

    def boot(self, name: str) -> None:
        """Switch a pod on: an empty process table, its old home."""
        self.check(
            f"ip netns add {name} && ip link add v-{name} type veth peer name eth0 netns {name}"
            f" && ip link set v-{name} master br0 up && ip -n {name} link set lo up"
            f" && ip -n {name} addr add {self.address[name]}/24 dev eth0 && ip -n {name} link set eth0 up"
            f" && ip -n {name} route add default via {DESK}"
        )
        self.machines[name] = self._start("node", name, [sys.prefix, str(self.shared)])
        wait_for(f"sshd of {name}", lambda: self.run(f"true < /dev/tcp/{self.address[name]}/22").returncode == 0, 20.0)

    def link(self, name: str, *, up: bool) -> None:
        """Connect a pod to the network, or cut it off: packets are lost without any error."""
        self.check(f"ip link set v-{name} {'up' if up else 'down'}")

    def start(self, command: str, on: str = "desk", env: Mapping[str, str] | None = None, **options: Any) -> Any:
        """A shell command on a machine, in the background; ended with the rig."""
        popen = subprocess.Popen(
            [*self.machines[on].enter(), "bash", "-c", f"cd {HOME}; {command}"],
            env={**_plain(), **(env or {})},
            **options,
        )
        self._background.append(popen)
        return popen

    def run(
        self, command: str, on: str = "desk", timeout: float = 240.0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A shell command on a machine, run to its end; output and errors in one text (`stdout`)."""
        return subprocess.run(
            [*self.machines[on].enter(), "bash", "-c", f"cd {HOME}; {command}"],
            env={**_plain(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def check(self, command: str, on: str = "desk", timeout: float = 240.0) -> str:
        """Output of a command that must succeed."""
        run = self.run(command, on, timeout)
        assert run.returncode == 0, f"{command!r} on {on} ended with {run.returncode}:\n{run.stdout[-6000:]}"
        return run.stdout

    def processes(self, on: str, name: str) -> list[int]:
        """Process ids (as the machine numbers them) of the processes of that name."""
        return [int(pid) for pid in self.run(f"pgrep -x {name}", on).stdout.split()]

    def cluster_yaml(self, exports: Mapping[str, str], mounts: Mapping[str, str] | None = None) -> Path:
        """The repository's cluster.yaml with the edits that docs/cluster.md names, and nothing else."""
        config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
        config["cluster_name"] = f"rig-{uuid.uuid4().hex[:8]}"  # Ray keeps ssh connections under /tmp by this name
        workers = [self.address[name] for name in self.names[1:]]
        config["provider"] |= {"head_ip": self.address["head"], "worker_ips": workers}
        config["auth"]["ssh_private_key"] = str(self.folder / "id")
        values = {"PLUMBLINE_NODE": "--num-cpus=1 --object-store-memory=100000000", **exports}
        config["setup_commands"][0] = edit_exports(config["setup_commands"][0], values)
        config["file_mounts"] |= mounts or {}
        place = self.folder / "cluster.yaml"
        place.write_text(yaml.safe_dump(config, sort_keys=False))
        return place


def edit_exports(command: str, values: Mapping[str, str]) -> str:
    """The setup command that writes ~/.plumbline.sh, with the values of some of its variables changed."""
    lines = command.splitlines()
    for name, value in values.items():
        places = [i for i, line in enumerate(lines) if line.strip().startswith(f"export {name}=")]
        assert len(places) == 1, f"cluster.yaml exports {name} {len(places)} times"
        lines[places[0]] = f"export {name}='{value}'"
    return "\n".join(lines) + "\n"


def _plain() -> dict[str, str]:
    """Environment of a login on a machine, with this test's interpreter first."""
    return {
        "HOME": HOME,
        "USER": "root",
        "LANG": "C.UTF-8",
        "PATH": f"{Path(sys.prefix, 'bin')}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
