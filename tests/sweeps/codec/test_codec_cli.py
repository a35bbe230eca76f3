"""The command line with the real codec packages (random weights): actors code shards, a run continues, a sweep ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.synthetic_speech import SpeechSpec, utterance
from tests.sweeps.mlflow_runs import runs_of_cells

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slow


def speech(root: Path, n: int) -> Path:
    """LJ Speech's layout with the first recordings long enough to train on and the others as short as allowed."""
    (root / "wavs").mkdir(parents=True)
    spec = SpeechSpec(sample_rate=22_050, min_s=1.0, max_s=1.5)
    lines = []
    for i in range(n):
        wave, text = utterance(spec, i)
        soundfile.write(root / "wavs" / f"LJ{i:03d}.wav", wave if i < 12 else wave[:4_500], 22_050)
        lines.append(f"LJ{i:03d}|{text}|{text}\n")
    (root / "metadata.csv").write_text("".join(lines))
    return root


def music(root: Path) -> Path:
    place = root / "fma_large" / "000"
    place.mkdir(parents=True)
    rows = [",set,set,track,track", ",split,subset,genre_top,title", "track_id,,,,"]
    for i in (1, 2):
        wave = 0.2 * np.sin(np.arange(44_100) * 0.02 * i)
        soundfile.write(place / f"{i:06d}.mp3", np.stack([wave, wave], axis=1), 44_100, format="MP3")
        rows.append(f"{i},training,large,Electronic,piece {i}")
    (root / "fma_metadata").mkdir()
    (root / "fma_metadata" / "tracks.csv").write_text("\n".join(rows) + "\n")
    return root


def run(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PLUMBLINE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(ROOT / "sweeps" / "codec_lm.py"), *arguments]
    done = subprocess.run(command, cwd=cache.parent, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def test_encodec_tokens_by_actors_then_a_sweep_on_them(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    source = ["--preset", "speech_a100", "--codec-weights", "random", "--set", "min_s=0.2", "--set", "holdout=0.3"]
    source += ["--set", f"audio_path={speech(tmp_path / 'LJSpeech-1.1', 66)}"]
    first = run(cache, "--tokenise", *source)
    assert "RANDOM weights" in first.stdout
    assert "2 shards, 2 of them made now: 66 clips" in first.stdout
    folder = Path(re.findall(r"^tokens\s+(.*)$", first.stdout, re.MULTILINE)[0])
    kept, lost = sorted((folder / "shards").iterdir())
    before = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (folder / "manifest.json").unlink()
    assert "2 shards, 1 of them made now" in run(cache, "--tokenise", *source).stdout
    assert (lost.read_bytes(), kept.stat().st_mtime_ns) == before
    small = {"scale": "local", "architectures": "transformer", "lr": "1e-3", "steps": 2, "warmup_steps": 1}
    small |= {"batch_size": 4, "eval_every": 2, "eval_clips": 3, "sample_s": 1.2, "sample_n": 2, "needs_gpu": "false"}
    settings = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    storage = ["--storage", str(tmp_path / "ledger"), "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    swept = run(cache, *source, *settings, *storage)
    assert "RANDOM weights" in swept.stdout
    assert "1/1 published" in swept.stdout
    report = (tmp_path / "runs" / "reports" / "codec_lm" / "speech_a100" / "report.md").read_text()
    rates = "sample rate: 22,050 Hz (64 files looked at); the codec works at 24,000 Hz, resampled; above 11,025 Hz"
    assert report.startswith("# ")  # below which the launcher says that cells are missing
    assert rates in report
    assert (kept.stat().st_mtime_ns, len(list(folder.parent.parent.glob("*/tokens")))) == (before[1], 1)
    (cell,) = runs_of_cells(f"sqlite:///{tmp_path}/mlflow.db", "codec_lm")
    shown = list(cell.data.metrics)
    assert shown[0] == "final_val_nll/ema"  # what the compare page opens on
    wanted = {"val_nll/ema", "perplexity/raw", "codebook_nll/ema/codebook 1", "train_loss", "grad_norm/heads"}
    assert wanted <= set(shown)


def test_dac_tokens_of_music_by_an_actor(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    where = ["--set", f"audio_path={music(tmp_path / 'fma')}", "--set", "min_s=0.5"]
    done = run(cache, "--tokenise", "--preset", "music_a100", "--codec-weights=random", *where)
    assert "dac has RANDOM weights" in done.stdout
    assert "1 shards, 1 of them made now: 2 clips" in done.stdout
