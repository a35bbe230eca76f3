"""The report of the codec language models on made-up results: every number in its place, every warning said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.codec.contrasts import choose_lr
from analysis.codec.published import Published, published_section
from analysis.codec.report import REAL, interval, write_report
from analysis.codec.results import Results

NAMES = ("olmo_hybrid", "transformer", "mc_la")
LEVEL = {"olmo_hybrid": 5.0, "transformer": 5.2, "mc_la": 5.4}
RATES = (1e-3, 2e-3, 4e-3)
BEST = {"olmo_hybrid": 2e-3, "transformer": 4e-3, "mc_la": 1e-3}
SEEDS = (0, 1)


def made_up(seeds: tuple[int, ...] = SEEDS, rates: tuple[float, ...] = RATES) -> Results:
    rng = np.random.default_rng(0)
    clip = rng.normal(0, 0.4, 30)
    models, curves, codebooks, clips, spikes, gates = [], [], [], [], [], []
    for name in NAMES:
        for lr in rates:
            for seed in seeds:
                who = {"architecture": name, "lr": lr, "seed": seed}
                level = LEVEL[name] + 0.3 * abs(np.log2(lr / BEST[name])) + 0.01 * seed
                per_clip = level + clip + rng.normal(0, 0.02, 30)
                values = {"raw": per_clip + 0.05, "ema": per_clip}
                record = {**who, "cell_key": f"{name}{lr}{seed}", "n_parameters": 1_300_000, "flops_per_token": 4e5}
                record |= {"tokens_per_second": 1000.0, "train_tokens": 5e5, "unigram_nll": 6.0, "corpus_audio": 60.0}
                for weights, some in values.items():
                    record[f"val_nll_{weights}"] = some.mean()
                    record[f"val_loss_smoothed_{weights}"] = some.mean() + 0.4
                    record[f"perplexity_{weights}"] = np.exp(some.mean())
                    record[f"bits_per_second_{weights}"] = some.mean() / np.log(2) * 500
                    frame = pd.DataFrame({"clip_id": np.arange(30), "nll": some * 100, "tokens": 100})
                    clips.append(frame.assign(weights=weights, **who))
                    for book in range(1, 5):
                        codebooks.append(
                            {**who, "weights": weights, "codebook": book, "nll": book, "top1": 0.5 / book, "top5": 0.8}
                        )
                models.append(record)
                for step in (600, 1_800, 12_000):
                    now = level + 300 / step
                    points = {"train_loss": now, "val_nll/ema": now, "val_nll_lo/ema": now - 0.1}
                    points |= {"val_nll_hi/ema": now + 0.1, "val_loss_smoothed/raw": now, "val_loss_smoothed/ema": now}
                    points |= {"grad_norm/mixer": 1.0, "grad_norm/heads": 0.1}
                    for metric, value in points.items():
                        plain, _, part = metric.partition("/")
                        kind = {"group" if part in ("mixer", "heads") else "weights": part} if part else {}
                        curves.append({**who, "metric": plain, "step": step, "value": value, **kind})
                spikes.append({**who, "group": "mixer", "value": 2.0})
                if name == "mc_la":
                    for weights, bias in (("start", -2.0), ("ema", -1.5)):
                        facts = {"openness": 0.18, "cache_mass": 0.5, "effective_mass": 0.09, "entropy_share": 0.7}
                        facts |= {"read_ratio": 2.0, "gate_bias": bias, "layer": 1, "clip_id": "a", "steps": 10}
                        gates.append({**who, "weights": weights, **facts})
                        gates.append(gates[-1] | {"clip_id": "short", "steps": 0, "cache_mass": np.nan})
    audio = []
    for i, name in enumerate((REAL, *NAMES)):
        numbers = {
            f"{m}{e}": 10.0 + i + d for m in ("frechet", "kernel") for e, d in (("", 0), ("_lo", -1), ("_hi", 1))
        }
        numbers |= {"coherence": 0.5, "coherence_lo": 0.4, "coherence_hi": 0.6, "frechet_limit": 9.0 + i}
        audio.append({"embedder": "ears", "architecture": name, "vectors": 96, "clips": 32, **numbers})
    frames = [pd.DataFrame(some) for some in (models, curves, codebooks)]
    return Results(
        models=frames[0],
        curves=frames[1],
        codebooks=frames[2],
        clips=pd.concat(clips, ignore_index=True),
        spikes=pd.DataFrame(spikes),
        gates=pd.DataFrame(gates),
        audio=pd.DataFrame(audio),
        samples=(),
    )


def test_a_whole_report(tmp_path: Path) -> None:
    main, findings = write_report(
        made_up(), tmp_path, preset="p", facts=["FACT"], audio_facts=["AUDIO"], published=Published("speech")
    )
    nll = main["val_nll"].tolist()
    assert findings[0].startswith(
        f"held-out NLL in nats per token, averaged weights, lowest first: olmo_hybrid {nll[0]:.4f} ["
    )
    assert (
        findings[1]
        == "3 of 3 pairs differ (p < 0.05 after Holm); olmo_hybrid is lower than transformer, mc_la by these tests."
    )
    assert findings[2].endswith("at the edge of those tried for transformer (the highest), mc_la (the lowest).")
    assert main["architecture"].tolist() == ["olmo_hybrid", "transformer", "mc_la"]
    assert main["lr"].tolist() == [BEST[name] for name in main["architecture"]]
    assert main["n_seeds"].tolist() == [2, 2, 2]
    text = (tmp_path / "report.md").read_text()
    assert all(f"- {line}" in text for line in findings)
    for piece in ("- FACT", "- AUDIO", "Embedder: ears", "3.8207 / 45.63", "4.2847 / 72.58", "gate bias"):
        assert piece in text
    assert "grid's edge (\\* above) for transformer (highest), mc_la (lowest)" in text
    assert "| olmo_hybrid | 1,300,000 | 0.002 | 2 |" in text
    assert "| transformer | 1,300,000 | 0.004* | 2 |" in text
    pairs = pd.read_parquet(tmp_path / "differences.parquet").set_index(["a", "b"])
    assert pairs.loc[("olmo_hybrid", "mc_la"), "difference"] == pytest.approx(0.4, abs=0.02)
    assert (pairs["p_holm"] < 0.05).all()
    assert "30 held-out clips (their recordings are not known), 2 seeds an architecture" in text
    assert "95% interval for other seeds and other recordings" in text
    assert "| mc_la | 1 | -2.000 → -1.500 | 0.180 | 0.500 | 0.090 | 0.700 | 2.000 |" in text
    assert "| real audio | 96 / 32 | 10.0 | 9.0 [9.0, 11.0] |" in text
    figures = ("curves", "learning_rates", "differences", "codebooks", "audio", "gradients")
    for name in figures:
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000


@pytest.mark.parametrize(("rates", "lr"), [(RATES, 2e-3), ((*RATES, 3e-4), 3e-4)])
def test_beside_the_published_run(rates: tuple[float, ...], lr: float) -> None:
    results = made_up(rates=rates)
    text = "\n".join(published_section(results, choose_lr(results.models), Published("speech", curve_clips=20)))
    here = f"architecture == 'olmo_hybrid' and lr == {lr}"
    curve = results.curves.query(f"{here} and metric == 'val_loss_smoothed' and step == 1800")
    shown = {"4.2847 / 72.58": curve.groupby("weights")["value"].mean()}
    models = results.models.query(here)
    shown["3.8207 / 45.63"] = pd.Series({w: models[f"val_loss_smoothed_{w}"].mean() for w in ("raw", "ema")})
    for (published, loss), step, clips in zip(shown.items(), ("1,800", "12,000"), (20, 30), strict=True):
        ours = " | ".join(f"{loss[w]:.4f} / {np.exp(loss[w]):.2f}" for w in ("raw", "ema"))
        assert f"| {step} | {published} | {ours} | {clips} |" in text
    assert f"olmo_hybrid at lr {lr:g} (published: 0.0003)" in text


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    nothing = pd.DataFrame()
    results = made_up(seeds=(0,), rates=(2e-3,))
    curves = results.curves[results.curves["metric"] != "grad_norm"]
    results = replace(results, gates=nothing, audio=nothing, curves=curves)
    _, findings = write_report(
        results, tmp_path, preset="p", facts=[], audio_facts=[], published=Published("speech", "another codec")
    )
    text = (tmp_path / "report.md").read_text()
    assert "One learning rate only, not tuned and perhaps handicapped by it: olmo_hybrid, transformer, mc_la" in text
    assert "grid's edge" not in text
    assert findings[1:] == ["3 of 3 differences not tested (needs ≥ 2 seeds); their order is no finding."]
    assert "**No intervals and no tests: needs ≥ 2 seeds.**" in text
    assert " [–] |" in text
    differences = text[text.index("## Differences") : text.index("## Compared")]
    assert "\\*" not in differences  # nothing is starred
    assert text.count("| – | ") >= 3  # no sd of one seed
    assert "Not comparable: another codec" in text
    for section in ("Generated audio", "Memory caches", "Gradients"):
        assert f"## {section}" not in text
    write_report(results, tmp_path, preset="p", facts=[], audio_facts=[])
    assert "3.8207" not in (tmp_path / "report.md").read_text()


def test_rates_that_left_no_cell_still_bound_the_grid(tmp_path: Path) -> None:
    results = made_up(seeds=(0,), rates=(2e-3,))
    tried = {"olmo_hybrid": (1e-3, 2e-3, 4e-3), "transformer": (1e-3, 2e-3), "mc_la": (2e-3, 4e-3)}
    main, _ = write_report(results, tmp_path, preset="p", facts=[], audio_facts=[], tried=tried)
    edges = dict(zip(main["architecture"], main["edge"], strict=True))
    assert edges == {"olmo_hybrid": "", "transformer": "highest", "mc_la": "lowest"}
    text = (tmp_path / "report.md").read_text()
    assert "Tried for transformer: 0.001, 0.002." in text
    assert "One learning rate only" not in text


def test_music_baselines_stand_with_their_architectures(tmp_path: Path) -> None:
    results = made_up()
    text = "\n".join(published_section(results, choose_lr(results.models), Published("music", "another codec")))
    best = results.models.query(f"architecture == 'transformer' and lr == {BEST['transformer']}")
    here = f"{best['val_nll_ema'].mean():.3f} / {best['val_nll_raw'].mean():.3f}"
    assert f"| transformer | 5.294 (162M) | {here} | 1M |" in text
    assert "hybrid_1_3" not in text  # not trained here
    assert "Not comparable: another codec" in text
    only = replace(results, models=results.models.query("architecture == 'mc_la'"))
    assert published_section(only, choose_lr(only.models), Published("music")) == []


def test_an_architecture_whose_seeds_scatter_is_said(tmp_path: Path) -> None:
    results = made_up(seeds=(0, 1, 2))
    wild = (results.clips["architecture"] == "mc_la") & (results.clips["seed"] == 2)
    clips = results.clips.assign(nll=results.clips["nll"] + 200.0 * wild)
    write_report(replace(results, clips=clips), tmp_path, preset="p", facts=[], audio_facts=[])
    assert "**The seeds of mc_la differ by a standard deviation of" in (tmp_path / "report.md").read_text()


def test_one_architecture_alone_has_no_differences(tmp_path: Path) -> None:
    results = made_up()
    keep = {
        name: frame[frame["architecture"].isin(["mc_la", REAL])] if len(frame) else frame
        for name, frame in vars(results).items()
        if isinstance(frame, pd.DataFrame)
    }
    write_report(replace(results, **keep), tmp_path, preset="p", facts=[], audio_facts=[])
    assert "## Differences" not in (tmp_path / "report.md").read_text()


def test_numbers_with_intervals() -> None:
    assert interval(1.23456, 1.0, 2.0) == "1.235 [1.000, 2.000]"
    assert interval(1.23456, float("nan"), float("nan"), 1) == "1.2"
    assert interval(float("nan"), 1.0, 2.0) == "–"
