"""cluster.yaml and its reader, and what a node's environment tells a launch; no cluster is needed."""

from __future__ import annotations

import copy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweeps.core import machine
from sweeps.core.cells import UserError
from sweeps.launch import command as command_module
from sweeps.launch import pods
from sweeps.launch.pods import Cluster
from sweeps.sae.sweep import SWEEP

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    key = tmp_path / "key"
    key.touch()
    made = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    made["auth"]["ssh_private_key"] = str(key)
    return made


def read(folder: Path, config: dict[str, Any]) -> Cluster:
    place = folder / "cluster.yaml"
    place.write_text(yaml.safe_dump(config))
    return Cluster.read(place)


def test_every_package_is_mounted_and_nothing_that_grows() -> None:
    mounts = yaml.safe_load((ROOT / "cluster.yaml").read_text())["file_mounts"]
    local = set(mounts.values())
    assert {"Makefile", "requirements.lock", "sweeps", "models", "data", "analysis"} == local
    assert all((ROOT / name).exists() and target == f"~/plumbline/{name}" for target, name in mounts.items())


@pytest.mark.parametrize(
    "line",
    [
        "export AWS_SECRET_ACCESS_KEY=abc123",
        "export AWS_ACCESS_KEY_ID=AKIA",
        "HF_TOKEN=hf_x; export HF_TOKEN",
        "export MLFLOW_TRACKING_PASSWORD='x'",
    ],
)
@pytest.mark.parametrize("where", ["setup_commands", "head_start_ray_commands", "initialization_commands"])
def test_keys_and_passwords_in_commands_are_refused_and_not_repeated(
    tmp_path: Path, config: dict[str, Any], where: str, line: str
) -> None:
    config[where] = [*config.get(where, []), f"cat > x <<'END'\n{line}\nEND"]
    with pytest.raises(UserError, match=rf"{where} \d+ in .* sets \w+, which Ray would write.*~/.aws") as refused:
        read(tmp_path, config)
    assert not any(value in str(refused.value) for value in ("abc123", "AKIA", "hf_x"))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("export PLUMBLINE_STORAGE=sftp://me:abc123@host/x", "has a login in an address of sftp"),
        ("export MLFLOW_TRACKING_URI='http://me:ab/c123@host'", "has a login in an address of http"),
        ("aws configure set aws_secret_access_key abc123", "sets aws_secret_access_key"),
        ("export MYSQL_PWD=abc123", "sets MYSQL_PWD"),
        ("export KEY_PASSPHRASE=abc123", "sets KEY_PASSPHRASE"),
    ],
)
def test_other_ways_to_give_a_secret_away_are_refused(
    tmp_path: Path, config: dict[str, Any], line: str, what: str
) -> None:
    for where in ("setup_commands", "docker"):
        changed = copy.deepcopy(config)
        if where == "docker":
            changed["docker"] = {"run_options": [f"-e {line}"]}
        else:
            changed[where] = [*changed[where], line]
        with pytest.raises(UserError, match=rf"{where}.* in .* {what}, which Ray would write") as refused:
            read(tmp_path, changed)
        assert "c123" not in str(refused.value)


def test_names_alone_are_no_secrets(tmp_path: Path, config: dict[str, Any]) -> None:
    config["setup_commands"] += [
        "export TOKENIZERS=1",
        "export HF_TOKEN=",
        'export A_KEY=""',
        "python -m keyring get x",
        "cd $OLDPWD; PWD=/tmp make; curl http://host:80/a@b; scp user@host:x .",
        "export PLUMBLINE_STORAGE=s3://bucket/ledger GOOGLE_APPLICATION_CREDENTIALS=/mounted.json",
    ]
    read(tmp_path, config)


def test_a_nodes_environment_is_its_users_alone(tmp_path: Path) -> None:
    first = yaml.safe_load((ROOT / "cluster.yaml").read_text())["setup_commands"][0]
    (tmp_path / ".plumbline.sh").write_text("old")
    (tmp_path / ".plumbline.sh").chmod(0o644)
    subprocess.run(["env", "-i", f"HOME={tmp_path}", "PATH=/usr/bin:/bin", "bash", "-c", first], check=True)
    assert (tmp_path / ".plumbline.sh").stat().st_mode & 0o777 == 0o600


def test_environment_of_a_node_is_written_for_every_kind_of_shell(tmp_path: Path) -> None:
    first, second, _ = yaml.safe_load((ROOT / "cluster.yaml").read_text())["setup_commands"]
    (tmp_path / ".bashrc").write_text("case $- in *i*) ;; *) return;; esac\n")
    shell = ["env", "-i", f"HOME={tmp_path}", "PATH=/usr/bin:/bin", "bash", "--norc", "-c"]
    for _ in range(2):  # as Ray wraps it, and twice, as a second `ray up` does
        for command in (first, second):
            subprocess.run([*shell, f"true && ({command})"], check=True)
    names = "$PLUMBLINE_STORAGE $RAY_ADDRESS $RAY_worker_niceness $PATH $PYTHONPATH"
    out = subprocess.run([*shell, f". ~/.bashrc; echo {names}"], capture_output=True, text=True, check=True).stdout
    storage, address, niceness, path, pythonpath = out.split()
    assert (storage, address, niceness) == ("s3://bucket/ledger", "auto", "0")
    assert path.startswith(f"{tmp_path}/plumbline/.venv/bin:")
    assert pythonpath == f"{tmp_path}/plumbline"
    # a worker's shell reads it after Ray has put the launch's code first; it must stay first
    run = [*shell, "PYTHONPATH=/launch; . ~/.bashrc; echo $PYTHONPATH"]
    launched = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert launched.strip() == f"/launch:{tmp_path}/plumbline"
    assert (tmp_path / ".bashrc").read_text().count(".plumbline.sh") == 1


def test_errors_name_value_rule_and_remedy(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read(tmp_path, config).nodes == ("10.0.0.11", "10.0.0.12", "10.0.0.13")
    broken: list[tuple[dict[str, Any], str]] = [
        ({"provider": config["provider"] | {"type": "aws"}}, "provider.type='aws'.*only local is known"),
        ({"provider": config["provider"] | {"worker_ips": ["10.0.0.11"]}}, "10.0.0.11 stands in .* more than once"),
        ({"provider": {"type": "local", "head_ip": "h"}}, "needs provider.head_ip, provider.worker_ips"),
        (
            {"provider": config["provider"] | {"worker_ips": "10.0.0.12"}},
            r"worker_ips='10.0.0.12' .*write worker_ips: \[",
        ),
        ({"provider": config["provider"] | {"head_ip": None}}, "provider.head_ip: None in .* is no name"),
        ({"provider": config["provider"] | {"external_head_ip": "-oProxyCommand=x"}}, "external_head_ip: '-oProxy"),
        ({"provider": config["provider"] | {"worker_ips": ["a; touch /tmp/x"]}}, "worker_ips: 'a; touch .* is no name"),
        ({"provider": config["provider"] | {"worker_ips": [None]}}, "worker_ips: None in .* is no name"),
        ({"auth": {"ssh_user": "-lroot"}}, "auth.ssh_user: '-lroot' in .* is no name; write letters, digits"),
        ({"auth": {"ssh_user": "u", "ssh_private_key": "/no/key"}}, "ssh_private_key=/no/key .* is no file"),
    ]
    for change, message in broken:
        with pytest.raises(UserError, match=message):
            read(tmp_path, config | change)
    assert pods.main(["up", "--config", str(tmp_path / "absent.yaml")]) == 2
    (tmp_path / "latin.yaml").write_bytes("cluster_name: \xe9t\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"cannot be read as a cluster \(UnicodeDecodeError"):
        Cluster.read(tmp_path / "latin.yaml")


def test_ssh_commands_survive_quotes_and_go_through_the_head(tmp_path: Path, config: dict[str, Any]) -> None:
    config["provider"]["external_head_ip"] = "head.example"
    cluster = read(tmp_path, config)
    assert cluster.door == "head.example"
    line = cluster.ssh("10.0.0.12", "echo 'a  b' \"$HOME\"", through_head=True)
    proxy = next(word for word in line if word.startswith("ProxyCommand="))
    assert shlex.split(proxy)[-3:] == ["-W", "%h:%p", "root@head.example"]
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    out = subprocess.run(["sh", "-c", line[-1]], capture_output=True, text=True, check=True, env=home).stdout
    assert out == f"a  b {tmp_path}\n"


def test_storage_and_commit_come_from_the_nodes_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUMBLINE_STORAGE", "s3://bucket/ledger")
    assert command_module.parser(SWEEP).parse_args([]).storage == "s3://bucket/ledger"
    assert command_module.parser(SWEEP).parse_args(["--storage", "x"]).storage == "x"
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / ".commit").write_text("abc-dirty\n")
    assert machine.git_commit() == "abc-dirty"
    monkeypatch.setenv("PLUMBLINE_GIT_COMMIT", "def")
    assert machine.git_commit() == "def"


def test_a_script_that_was_copied_home_finds_the_checkout(tmp_path: Path) -> None:
    """`ray submit` copies the sweep's file to ~ and runs it there; PYTHONPATH leads to the checkout."""
    (tmp_path / "proxy_gap.py").write_text((ROOT / "sweeps" / "proxy_gap.py").read_text())
    command = [sys.executable, str(tmp_path / "proxy_gap.py"), "--help"]
    env = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--storage URI" in run.stdout
