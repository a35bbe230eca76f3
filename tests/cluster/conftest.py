"""The rig, its S3 server and the cluster that `make cluster-up` makes on it, shared by the tests of a file in order."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rig import DESK, SHARED, Rig, missing_for_rig, wait_for


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A desk, a head and two workers, switched on."""
    if reason := missing_for_rig():
        pytest.skip(reason)
    with Rig(tmp_path_factory.mktemp("rig")) as machines:
        yield machines


@pytest.fixture(scope="module")
def s3(rig: Rig) -> Path:
    """Folder `.aws` that opens an S3 server with the bucket `bucket`, reached by every node."""
    with open(rig.folder / "s3.log", "wb") as log:
        rig.start(f"python -m moto.server -H {DESK} -p 9000", stdout=log, stderr=log)
    wait_for("the S3 server", lambda: rig.run(f"true < /dev/tcp/{DESK}/9000").returncode == 0, 120)
    rig.check(
        f"curl -fsS -X PUT -H 'Authorization: AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request' "
        f"http://{DESK}:9000/bucket"
    )
    folder = rig.folder / "aws"
    folder.mkdir()
    (folder / "config").write_text(f"[default]\nregion = us-east-1\nendpoint_url = http://{DESK}:9000\n")
    (folder / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    return folder


@pytest.fixture(scope="module")
def config(rig: Rig, s3: Path) -> Path:
    """cluster.yaml of the rig: storage on the folder that all nodes mount, MLflow on the head's address."""
    head = rig.address["head"]
    return rig.cluster_yaml(
        {
            "PLUMBLINE_STORAGE": f"file+shared://{SHARED}/ledger",
            "MLFLOW_TRACKING_URI": f"http://{head}:5000",
            "PLUMBLINE_MLFLOW_HOST": head,
        },
        {"~/.aws": str(s3)},
    )
