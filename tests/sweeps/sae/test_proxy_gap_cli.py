"""`python sweeps/proxy_gap.py` from a user's chair: plans, one-line errors, local and hub sources, kills, S3."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.sae import published
from models.sae.saelens import load_saelens
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch import command as command_module
from sweeps.ledger.ledger import Ledger
from sweeps.sae import preflight
from sweeps.sae.presets import PRESETS
from sweeps.sae.report import is_the_studys
from sweeps.sae.sweep import SWEEP
from tests.sweeps.tiny_proxy_gap import MODEL, save_lm, save_shards, settings, tiny_grid

ROOT = Path(__file__).resolve().parents[3]
HUB_SERVER = ROOT / "tests" / "data" / "hub_server.py"
COLUMNS = [
    *("model", "layer", "depth", "k", "seed", "tokens", "r2", "r2_legacy", "r2_energy", "ce_rec", "ce_rec_lo"),
    *("ce_rec_hi", "ce_loss_score", "mse", "cosine", "relative_error", "alive", "swd", "abs_gdelta", "nmse"),
    *("rate_bits", "pr", "pr_deflated", "loss_orig", "loss_recon", "loss_zero", "cell_key"),
]
EXTRA_COLUMNS = {
    *("rate_bits_entropy", "d_model", "d_sae"),
    *(
        "r2_no_sinks",
        "pr_no_sinks",
        "sst_share_first",
        "sst_share_top1pct",
        "r2_no_first",
        "r2_no_first4",
        "r2_no_huge",
    ),
    *("r2_deflated1", "r2_deflated2", "r2_deflated4", "r2_deflated8", "r2_whitened"),
    *("kl", "fisher", "fisher_diag", "fisher_sampled", "fisher_deviation", "attention_plan", "attention_cost"),
    *("first_order", "first_order_slope", "first_order_correlation", "first_order_signs"),
    *("l0", "density_median", "dense_share", "sae_class"),
}


@pytest.fixture(scope="module")
def tiny_lms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("lms"), MODEL)


@pytest.fixture(scope="module")
def byte_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shards(tmp_path_factory.mktemp("text") / "shards", shards=3, rows=1400, length=64, vocab=257)


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    return kept | {"NO_PROXY": "127.0.0.1"} | changes


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "sweeps" / "proxy_gap.py"), *arguments]


def cli(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env=env or environment(), capture_output=True, text=True, timeout=560
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The command line called in this process, for what must end before Ray starts; a machine of fixed size."""
    machine = Machine(nodes=1, cpus=8, gpus=0, memory_bytes=32 * 2**30, hardware="a machine of the tests")
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: machine))
    monkeypatch.setattr(command_module, "connect", lambda *a: pytest.fail("Ray was started"))
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def main(*arguments: str) -> int:
    return command_module.main(SWEEP, list(arguments))


def test_command_line_is_frozen() -> None:
    actions = {a.option_strings[-1]: (a.default, a.nargs, a.metavar) for a in command_module.parser(SWEEP)._actions}
    assert actions == {
        "--help": ("==SUPPRESS==", 0, None),
        "--preset": ("local", None, "P"),
        "--plan": (False, 0, None),
        "--all": (False, 0, None),
        "--only": ([], "+", "KEY"),
        "--report": (False, 0, None),
        "--open": (False, 0, None),
        "--retry-failed": (False, 0, None),
        "--storage": ("runs/ledger", None, "URI"),
        "--tracking-uri": (None, None, "URI"),
        "--report-dir": ("runs/reports", None, "DIR"),
        "--address": (None, None, "ADDR"),
        "--set": ([], None, "FIELD=VALUE"),
        "--search": (None, None, "KIND"),
        "--objective": (None, None, "COLUMN:min|max"),
        "--trials": (None, None, "N"),
        "--where": (None, None, "COLUMN>=X"),
        "--each": (None, None, "FIELD"),
        "--batch": (None, None, "N"),
        "--search-seed": (None, None, "N"),
        "--stop": (None, None, "KIND"),
        "--eta": (None, None, "N"),
        "--rungs": (None, None, "N"),
        "--spend": (None, None, "COST"),
        "--confirm": (None, None, "N"),
    }
    assert list(PRESETS) == [
        *["local", "smollm2", "scale", "released", "fast2", "fast3", "phase2", "budget_k32", "bridge"]
    ]
    named = {"cells_per_pack", "threads", "max_retries", "checkpoint_seconds", "lm_path", "stream_path", "on_corrupt"}
    assert named <= set(RunSettings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("preset", "cells", "models"),
    [
        *[("local", 96, 2), ("smollm2", 30, 1), ("fast2", 36, 2), ("fast3", 12, 3), ("phase2", 48, 2)],
        *[("budget_k32", 4, 2), ("bridge", 486, 3)],
    ],
)
def test_plan_of_every_preset(
    here: Path, capsys: pytest.CaptureFixture[str], preset: str, cells: int, models: int
) -> None:
    assert main("--preset", preset, "--plan", "--set", "probe=false") == 0
    out = capsys.readouterr().out
    assert f"cells        {cells} planned, 0 done, {cells} to do" in out
    passes = next(line for line in out.splitlines() if line.startswith("LM passes"))
    assert int(passes.split()[2]) >= models
    for line in ("packs", "tokens", "FLOPs", "memory", "time", "not measured", "nothing was run"):
        assert line in out
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("preset", [name for name, grid in PRESETS.items() if grid.tokens])  # "released" trains nothing
def test_smallest_budget_of_a_preset_outlasts_the_warm_up(preset: str) -> None:
    grid = PRESETS[preset]
    assert min(grid.tokens) // grid.batch_tokens > 2 * grid.warmup_steps


@pytest.mark.parametrize(
    ("preset", "changes", "answer"),
    [
        ("fast2", {}, True),
        ("fast2", {"k": (8,), "depths": ("mid",), "models": ("pythia-70m",), "seeds": (1,)}, True),
        ("fast2", {"stream": "embedded"}, False),
        ("bridge", {"expansion": 8}, False),
        ("local", {}, False),
    ],
)
def test_published_numbers_stand_beside_the_studys_settings_alone(
    preset: str, changes: dict[str, Any], answer: bool
) -> None:
    assert is_the_studys(preset, replace(PRESETS[preset], **changes), PRESETS[preset]) is answer


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset", "fast"], "preset 'fast' is not known; did you mean fast"),
        (settings(layers=6), "layer=6 is out of range for standin-small; choose 0 to 5"),
        (settings(k=3000), "k=3000 exceeds d_sae=2048; choose k <= d_sae"),
        (settings(tokens=81921), "tokens=81921 is not a multiple of batch_tokens=2048; choose tokens=81920 or 83968"),
        (settings(schedule="cosine"), "schedule='cosine' cannot serve nested budgets"),
        (settings(schedule="wsd", decay_steps=31), "tokens=81920 are 40 steps, fewer than warmup_steps=10 + decay"),
        (settings(lm_path="nowhere"), "lm_path=nowhere holds no config.json"),
        (settings(stream="pile", stream_path="nowhere"), "stream nowhere holds no *.parquet shard"),
        (["--preset", "smollm2", *settings(stream="pile")], "GPT-NeoX ids but smollm2-135m has a vocabulary of 49,152"),
        (["--storage", "/proc/nowhere"], "storage /proc/nowhere/proxy_gap/1 is not writable"),
        (["--only", "zz"], "--only 'zz' is not the beginning of a key (up to 16 of 0-9 a-f)"),
    ],
)
def test_bad_input_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str) -> None:
    assert main(*arguments) == 2
    errors = capsys.readouterr().err
    assert line in errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize("source", ["offline", "unreachable"])
def test_without_network_the_error_names_what_works(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", source == "offline")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(preflight, "_cached", lambda model: False)
    began = time.monotonic()
    assert main("--preset", "fast3") == 2
    errors = capsys.readouterr().err
    assert len(errors.strip().splitlines()) == 1
    assert "http://127.0.0.1:9" in errors
    assert "--preset local or --preset smollm2, which need no network" in errors
    assert "--set lm_path=DIR --set stream_path=DIR" in errors
    assert time.monotonic() - began < 30


def test_short_and_corrupt_streams_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], tiny_lms: Path, byte_shards: Path
) -> None:
    assert main(*tiny_grid(tiny_lms, byte_shards, tokens=256_000_000)) == 2
    errors = capsys.readouterr().err
    assert "the plan needs 256,000,000 and 8: lower the budget or add shards" in errors
    assert main(*tiny_grid(tiny_lms, byte_shards, eval_sequences=4000)) == 2
    assert "held-out sequences" in capsys.readouterr().err

    folder = here / "shards"
    folder.mkdir()
    for shard in byte_shards.iterdir():
        (folder / shard.name).write_bytes(shard.read_bytes())
    (folder / "train-00001-of-00003.parquet").write_bytes(b"PAR1 no parquet PAR1")
    assert main(*tiny_grid(tiny_lms, folder)) == 2
    errors = capsys.readouterr().err
    assert "train-00001-of-00003.parquet" in errors
    assert "--set on_corrupt=skip" in errors
    assert len(errors.strip().splitlines()) == 1


def test_text_beyond_the_vocabulary_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], tiny_lms: Path) -> None:
    wide = save_shards(here / "wide", shards=1, rows=1400, length=64, vocab=50304)
    assert main(*tiny_grid(tiny_lms, wide, tokens=65536)) == 2
    errors = capsys.readouterr().err
    assert f"of {wide} exceeds the vocabulary of {MODEL}, 257; choose text that was tokenized for this model" in errors
    assert len(errors.strip().splitlines()) == 1


def spoil(shard: Path) -> None:
    """Damage pages in the middle of a shard; its footer stays whole."""
    data = bytearray(shard.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = os.urandom(20_000)
    shard.write_bytes(data)


@pytest.mark.slow
def test_corrupt_page_is_named_once_or_skipped(launch: Callable[..., Any], tmp_path: Path, tiny_lms: Path) -> None:
    shards = save_shards(tmp_path / "shards", shards=3, rows=1400, length=64, vocab=257)
    spoil(shards / "train-00001-of-00003.parquet")
    grid = tiny_grid(tiny_lms, shards, k=4, tokens=163_840)
    stopped = launch(SWEEP, *grid)
    assert stopped.code == 2  # the text that will be trained on is read once before any pack
    (line,) = stopped.err.strip().splitlines()
    assert "train-00001-of-00003.parquet" in line
    assert "on_corrupt=skip" in line
    skipped = launch(SWEEP, *grid, "--retry-failed", *settings(on_corrupt="skip"))
    assert skipped.code == 0, skipped.err
    assert "skipped: shard train-00001-of-00003.parquet" in skipped.out + skipped.err


class TestPythia:
    """The study's loading path: Pythia's architecture from disk and from a hub, shards of the data set's schema."""

    GRID = settings(
        models="pythia-70m",
        k=8,
        depths="mid",
        tokens=8192,
        expansion=1,
        batch_tokens=1024,
        shuffle_sequences=16,
        eval_sequences=4,
        threads=1,
    )

    @pytest.fixture(scope="class")
    def sources(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("pythia")
        shards = save_shards(folder / "pile", shards=2, rows=150, length=1024, vocab=50304)
        return save_lm(folder / "lms", "pythia-70m"), shards

    @pytest.fixture(scope="class")
    def local(self, sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("local")
        paths = settings(lm_path=sources[0], stream_path=sources[1])
        run = cli(folder, "--preset", "fast2", *paths, *self.GRID)
        assert run.returncode == 0, run.stderr
        assert "1/1 published" in run.stdout
        assert f"lm_path: read from {sources[0]} instead" in run.stdout
        assert "ends inside the learning rate's warm-up of 500 steps" in run.stdout
        return folder

    @pytest.mark.slow
    def test_local_directories_to_report(self, local: Path, sources: tuple[Path, Path]) -> None:
        out = local / "runs" / "reports" / "proxy_gap" / "fast2"
        cells = pd.read_parquet(out / "cells.parquet")
        assert [c for c in cells.columns if c not in EXTRA_COLUMNS] == COLUMNS
        assert set(cells.columns) == {*COLUMNS, *EXTRA_COLUMNS}
        assert list(pd.read_csv(out / "cells.csv").columns) == list(cells.columns)
        (cell,) = cells.to_dict("records")
        assert (cell["model"], cell["layer"], cell["k"], cell["tokens"]) == ("pythia-70m", 3, 8, 8192)
        numbers = cells.drop(columns=["model", "depth", "cell_key", "sae_class"])
        unknown = [name for name in numbers.columns if not np.isfinite(float(numbers[name].iloc[0]))]
        assert unknown == ["ce_rec_lo", "ce_rec_hi"]  # four evaluated sequences carry no interval
        assert cell["loss_orig"] == pytest.approx(np.log(50304), abs=0.3)  # random weights know nothing
        assert cell["ce_rec"] == pytest.approx(2 - cell["loss_recon"] / cell["loss_orig"], abs=1e-6)
        report = (out / "report.md").read_text()
        assert report.startswith("# ")  # below which the launcher says that cells are missing
        assert "“Published” columns are blank: these are not the study's settings" in report
        assert str(sources[0]) in report
        assert str(published.PARTICIPATION_RATIO[("pythia-70m", 1)][0]) not in report

    @pytest.mark.slow
    def test_saelens_opens_the_published_sae(self, local: Path) -> None:
        from sae_lens import SAE

        folder = next((local / "runs" / "ledger" / "proxy_gap" / "1").glob("[!._]*/sae"))
        theirs = SAE.load_from_disk(str(folder))
        ours, metadata = load_saelens(folder)
        for source in (metadata, theirs.cfg.metadata):
            assert source["model_name"] == "pythia-70m"
            assert source["hook_name"] == "blocks.3.hook_resid_post"
            assert source["context_size"] == 256
            assert source["training_tokens"] == 8192
            assert source["sae_lens_version"]
        assert (theirs.cfg.d_in, theirs.cfg.d_sae) == (512, 512)
        x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        index, value = ours.encode(x)
        dense = torch.zeros(64, 512).scatter_(1, index.long(), value)
        torch.testing.assert_close(theirs.encode(x), dense, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(theirs(x), ours.decode(index, value), rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_hub_gives_the_local_result(self, local: Path, sources: tuple[Path, Path], tmp_path: Path) -> None:
        with hub(sources[1], sources[0] / "pythia-70m") as server:
            env = environment(
                HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1"
            )
            run = cli(tmp_path, "--preset", "fast2", *self.GRID, env=env)
        assert run.returncode == 0, run.stderr
        assert "Traceback" not in run.stderr
        here, there = (Ledger(str(f / "runs" / "ledger"), "proxy_gap", "1") for f in (local, tmp_path))
        (key,) = here.done()
        pd.testing.assert_frame_equal(here.read(key).rows, there.read(key).rows, check_exact=True)
        assert here.file(key, "sae/sae_weights.safetensors") == there.file(key, "sae/sae_weights.safetensors")
        commits = [f"EleutherAI/pythia-70m@{'a' * 40}", f"NeelNanda/pile-small-tokenized-2b@{'a' * 40}"]
        assert there.read(key).meta["hub_commits"] == commits
        assert all(f"from the hub: {commit}" in run.stdout for commit in commits)
        unpinned = {(method, path) for method, path, _ in server.requests if "/main" in path}
        assert unpinned == {("HEAD", "/EleutherAI/pythia-70m/resolve/main/config.json")}  # which asks for the commit


@contextmanager
def hub(shards: Path, checkpoint: Path) -> Iterator[Any]:
    """A loopback server of the data set's shards (tests/data) and of one checkpoint, as the hub serves them."""
    spec = importlib.util.spec_from_file_location("hub_server_cli", HUB_SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    with module.HubServer(shards, checkpoint).running() as server:
        yield server


@pytest.mark.slow
def test_grid_and_report_on_s3(tmp_path: Path, tiny_lms: Path, byte_shards: Path) -> None:
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        s3fs.S3FileSystem(endpoint_url=url, key="test", secret="test").mkdir("plumbline-cli")
        env = environment(
            AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1"
        )
        grid = [*tiny_grid(tiny_lms, byte_shards, tokens=16_384), "--storage", "s3://plumbline-cli/ledger"]
        run = cli(tmp_path, *grid, env=env)
        assert run.returncode == 0, run.stderr
        assert "2/2 published" in run.stdout
        report = tmp_path / "runs" / "reports" / "proxy_gap" / "local"
        first = (report / "cells.csv").read_text()
        assert len(first.splitlines()) == 3
        (report / "cells.csv").unlink()
        again = cli(tmp_path, "--report", *grid, env=env)
        assert again.returncode == 0, again.stderr
        assert (report / "cells.csv").read_text() == first
        assert not (tmp_path / "runs" / "ledger").exists()
    finally:
        server.stop()
