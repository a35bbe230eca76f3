"""`--preset released`: audits of SAEs that were trained elsewhere, against our own rows and SAELens' evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from data.token_stream import TokenStream
from models.host.host_lm import HostLM
from sweeps.core.cells import UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings, apply_settings
from sweeps.launch.context import PackContext, Place
from sweeps.ledger.ledger import Ledger
from sweeps.sae.cells import Grid, ReleasedCell, SAECell
from sweeps.sae.presets import PRESETS
from sweeps.sae.released import folder_of_sae
from sweeps.sae.sweep import SWEEP
from tests.sweeps.sae.test_sae_grid import CONTEXT, GRID, Numbers, fresh, lm, toy_sources, train
from tests.sweeps.sae.test_sae_sources import _be_the_hub, hub_server
from tests.sweeps.tiny_proxy_gap import save_shards

__all__ = ["lm", "toy_sources"]
D = 64
MACHINE = Machine(nodes=1, cpus=2, gpus=0, memory_bytes=2**36, hardware="of the tests")


@pytest.fixture(autouse=True)
def audited_sources(lm: HostLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.sae.sources.open_lm", lambda cell, run, device, progress: lm)
    monkeypatch.setattr("sweeps.sae.sources.open_stream", lambda cell, run, tokenizer_dir=None, **how: Numbers())


def preset(saes: Sequence[Path | str], **changes: Any) -> Grid:
    return replace(PRESETS["released"], saes=tuple(map(str, saes)), eval_sequences=10, **changes)


def audit(grid: Grid) -> tuple[Ledger, list[SAECell]]:
    ledger, cells = fresh(), list(SWEEP.plan(grid))
    for pack in SWEEP.pack(cells, grid, MACHINE, RunSettings()):
        SWEEP.run(pack, grid, in_process(ledger))
    return ledger, cells


def in_process(ledger: Ledger) -> PackContext:
    return PackContext(
        ledger, RunSettings(), threads=1, device="cpu", fingerprint=lambda cell: "f", place=Place("test")
    )


def lens_folder(kind: str, folder: Path, d_in: int = D, layer: int = 3, **metadata: Any) -> Path:
    """A random SAE saved by SAELens."""
    from sae_lens import saes
    from sae_lens.saes.sae import SAEMetadata

    named = {"model_name": "standin-small", "hook_name": f"blocks.{layer}.hook_resid_post", "context_size": CONTEXT}
    k = {"k": 6} if kind == "TopK" else {}
    config = getattr(saes, f"{kind}SAEConfig")(d_in=d_in, d_sae=160, metadata=SAEMetadata(**named | metadata), **k)
    sae = getattr(saes, f"{kind}SAE")(config)
    torch.manual_seed(len(kind))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 8)
    sae.save_model(folder)
    return folder


def export(ledger: Ledger, cell: SAECell, folder: Path) -> Path:
    folder.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (folder / name).write_bytes(ledger.file(cell.key, f"sae/{name}"))
    return folder


def test_a_cell_of_ours_audited_from_its_own_folder_is_its_published_row(tmp_path: Path) -> None:
    """TopK and BatchTopK, bit for bit: every number of the row, the geometry, and the sequences."""
    grid = replace(GRID, sae=("topk", "batchtopk"), depths=("mid",), k=(4,), tokens=(640,))
    mine, cells = fresh(), list(SWEEP.plan(grid))
    train(cells, mine)
    folders = [export(mine, cell, tmp_path / cell.sae) for cell in cells]
    theirs, audits = audit(preset(folders))
    for cell, audited in zip(cells, audits, strict=True):
        assert (audited.sae, audited.layer, audited.context) == (cell.sae, cell.layer, cell.context)
        wanted, found = mine.read(cell.key), theirs.read(audited.key)
        one, two = wanted.numbers(), found.numbers()
        differing = {n for n in two if not (one[n] == two[n] or (np.isnan(one[n]) and np.isnan(two[n])))}
        assert differing <= ({"rate_bits", "rate_bits_entropy"} if cell.sae != "topk" else set())
        assert len(two) > 40
        pd.testing.assert_frame_equal(wanted.table("geometry_layer"), found.table("geometry_layer"), check_exact=True)
        assert mine.file(cell.key, "sequences.parquet") == theirs.file(audited.key, "sequences.parquet")
        assert not any(name.startswith("sae/") for name in found.files)


def test_losses_are_those_of_saelens_evaluation(lm: HostLM, tmp_path: Path) -> None:
    """Standard, gated, JumpReLU and TopK on one pass of the model, against `run_evals` on TransformerBridge."""
    from sae_lens import SAE
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens.model_bridge import TransformerBridge

    from benchmarks.evaluation import FixedTokens
    from tests.models.host.test_host_lm import _char_tokenizer

    kinds = ("Standard", "Gated", "JumpReLU", "TopK")
    folders = [lens_folder(kind, tmp_path / kind) for kind in kinds]
    ledger, cells = audit(preset(folders))
    bridge: Any = TransformerBridge.boot_transformers(
        "EleutherAI/pythia-70m", hf_model=lm.model, tokenizer=_char_tokenizer(tmp_path / "tokenizer")
    )
    store: Any = FixedTokens(torch.from_numpy(Numbers().eval_sequences(10)).long())
    config = EvalConfig(
        batch_size_prompts=10,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    for cell, folder in zip(cells, folders, strict=True):
        sae = SAE.load_from_disk(folder)
        metrics, _ = run_evals(sae, store, bridge, ActivationScaler(), config, exclude_special_tokens=False)
        theirs, ours = metrics["model_performance_preservation"], ledger.read(cell.key).numbers()
        for mine, name in (("loss_orig", "without_sae"), ("loss_recon", "with_sae"), ("loss_zero", "with_ablation")):
            assert ours[mine] == pytest.approx(theirs[f"ce_loss_{name}"], abs=1e-5), (cell.sae, name)
        assert ours["l0"] == pytest.approx(metrics["sparsity"]["l0"], rel=1e-5)
        assert ours["r2"] == pytest.approx(metrics["reconstruction_quality"]["explained_variance"], abs=1e-4)


def test_one_pass_of_the_model_serves_all_saes_and_identity_is_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.sae import evaluate

    made: list[int] = []
    real = evaluate.Evaluation

    class Counted(real):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any) -> None:
            made.append(1)
            super().__init__(*arguments)

    monkeypatch.setattr(evaluate, "Evaluation", Counted)
    folders = [lens_folder("JumpReLU", tmp_path / "a"), lens_folder("TopK", tmp_path / "b", layer=1)]
    grid = preset(folders, rungs="free")
    ledger, cells = audit(grid)
    assert ledger.done() == {cell.key for cell in cells}
    assert len(made) == 1
    moved = shutil.copytree(folders[0], tmp_path / "moved")
    (same,) = SWEEP.plan(preset([moved], rungs="free"))
    assert same.key == cells[0].key
    with pytest.raises(UserError, match="has the content of"):
        SWEEP.plan(preset([folders[0], moved]))
    config = json.loads((moved / "cfg.json").read_text())
    (moved / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": False}))
    (other,) = SWEEP.plan(preset([moved], rungs="free"))
    assert other.key != same.key
    lines = SWEEP.report([ledger.read(cell.key) for cell in cells], "released", grid, tmp_path / "report")
    table = pd.read_parquet(tmp_path / "report" / "cells.parquet")
    assert set(table["sae_class"]) == {"jumprelu", "topk"}
    assert set(table["sae"]) == {str(folder) for folder in folders}
    assert {"l0", "kl", "fisher", "fisher_diag", "first_order_slope", "attention_plan", "r2", "ce_rec"} <= set(table)
    assert lines[0].startswith("answer")
    assert "2 SAEs that were trained elsewhere" in SWEEP.banner("released", grid)[0]


def test_a_relative_folder_is_found_from_a_workers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lens_folder("TopK", tmp_path / "saes" / "one")
    monkeypatch.chdir(tmp_path)
    grid = preset([Path("saes/one")], rungs="free")
    (cell,) = SWEEP.plan(grid)
    assert isinstance(cell, ReleasedCell)
    assert cell.source == str(folder)
    assert cell.key == SWEEP.plan(preset([folder], rungs="free"))[0].key
    (pack,) = SWEEP.pack([cell], grid, MACHINE, RunSettings())
    monkeypatch.chdir("/")
    ledger = fresh()
    SWEEP.run(pack, grid, in_process(ledger))
    assert ledger.done() == {cell.key}


def test_a_release_on_the_hub_is_the_folder_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RELEASE:ID from a loopback hub: config and weights of one commit, the same cell as from the folder."""
    repository = tmp_path / "repository"
    folder = lens_folder("JumpReLU", repository / "layer_3" / "width_160")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with hub_server.HubServer(tmp_path, repository).running() as hub:
        _be_the_hub(monkeypatch, hub.url)
        release = f"{hub_server.MODEL}:layer_3/width_160"
        (cell,) = SWEEP.plan(preset([release]))
        assert isinstance(cell, ReleasedCell)
        assert cell.source == release
        assert cell.key == SWEEP.plan(preset([folder]))[0].key
        for wrong, message in (
            (f"{hub_server.MODEL}:layer_4", "holds neither layer_4/cfg.json nor layer_4/config.json"),
            (f"{hub_server.MODEL}:../secrets", "leads out of its repository"),
        ):
            with pytest.raises(UserError, match=message) as caught:
                SWEEP.plan(preset([wrong]))
            assert "\n" not in str(caught.value)
        commit = folder_of_sae(release).parents[1].name
        assert commit == "a" * 40


@pytest.mark.parametrize(
    ("how", "changes", "message"),
    [
        ({"d_in": 48}, {}, "has d_in=48, but standin-small has width 64; give its own model with --set models="),
        ({"model_name": None}, {}, "does not name the SAE's language model; give it with --set models="),
        ({"model_name": "no-such-model"}, {}, "model_name='no-such-model' is not known; give OWNER/NAME"),
        ({"hook_name": "blocks.3.attn.hook_z"}, {}, r"hook blocks\.3\.attn\.hook_z is not supported"),
        ({"hook_name": None}, {}, r"hook \(not named\) is not supported"),
        ({"layer": 6}, {}, "layer=6 is out of range for standin-small; it has layers 0 to 5"),
        ({}, {"models": ("standin-large",)}, "has d_in=64, but standin-large has width 128"),
        ({}, {"models": ("standin-small", "standin-large")}, "are several, but each SAE belongs to one model"),
        ({}, {"lm_dtype": "float8"}, "lm_dtype='float8' is not known"),
    ],
)
def test_saes_that_cannot_be_audited_are_one_line(
    how: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = lens_folder("Standard", tmp_path / "sae", **how)
    with pytest.raises(UserError, match=message) as caught:
        SWEEP.plan(preset([folder], **changes))
    assert "\n" not in str(caught.value)


def test_a_preset_without_saes_and_a_place_that_is_none_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="saes= names no SAE; give folders or RELEASE:ID"):
        SWEEP.plan(PRESETS["released"])
    with pytest.raises(UserError, match=r"is no folder and no RELEASE:ID"):
        SWEEP.plan(preset([tmp_path / "nowhere"]))
    (grid,) = apply_settings([f"saes={tmp_path}", "models=standin-small"], PRESETS["released"])
    with pytest.raises(UserError, match=r"holds no cfg\.json"):
        SWEEP.plan(grid)


def test_a_corrupt_shard_of_an_audit_is_one_line_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sentence as of a training pack; --set on_corrupt=skip, which it names, audits without the shard."""
    shards = save_shards(tmp_path / "shards", shards=2, rows=400, length=CONTEXT, vocab=256)
    first = sorted(shards.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-1000] + bytes(1000))
    grid = preset([lens_folder("TopK", tmp_path / "sae")], rungs="free")
    for skip in (False, True):
        stream = TokenStream(source=str(shards), context=CONTEXT, on_corrupt="skip" if skip else "raise")
        monkeypatch.setattr("sweeps.sae.sources.open_stream", lambda *a, stream=stream, **how: stream)
        if skip:
            ledger, cells = audit(grid)
            assert ledger.done() == {cells[0].key}
        else:
            with pytest.raises(
                UserError, match=r"; mend the shard, or leave it out with --set on_corrupt=skip"
            ) as caught:
                audit(grid)
            assert first.name in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_damaged_sae_fails_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    good, bad = (lens_folder("JumpReLU", tmp_path / name, layer=n) for name, n in (("good", 3), ("bad", 1)))
    tensors = load_file(bad / "sae_weights.safetensors")
    tensors["b_dec"][3] = float("nan")
    save_file(tensors, bad / "sae_weights.safetensors")
    ledger, cells = audit(preset([bad, good], rungs="free"))
    assert ledger.done() == {cells[1].key}
    assert "is damaged, or was trained on other activations" in str(ledger.failures([cells[0].key]))
