"""From published language models to the tables that `analysis` turns into the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.codec.audio_distance import LEAST_CLIPS, Embeddings, frechet_distance, kernel_distance
from analysis.codec.contrasts import choose_lr
from analysis.codec.published import Published
from analysis.codec.report import REAL, write_report
from analysis.codec.results import Results, at
from analysis.codec.texts import text_effects, text_figure, text_section, verdict
from analysis.crossed import NEEDS_SEEDS, units_mean
from sweeps.codec.audio_sets import SAMPLING, AudioSets
from sweeps.codec.cells import CURVE_CLIPS
from sweeps.codec.clip_tables import with_recordings
from sweeps.codec.texts import NONE, RIGHT, arm_name, text_arm
from sweeps.codec.tokens import banner
from sweeps.core.cells import PublishedCell, UserError
from sweeps.launch.lines import labelled
from sweeps.ledger.published import file_of, files_of, recorded, tables_of

if TYPE_CHECKING:
    from sweeps.codec.cells import Study

_PLAIN = ("n_parameters", "tokens_per_second", "train_tokens", "unigram_nll", "corpus_audio")
_POINTS = ("train_loss", "val_nll", "val_nll_lo", "val_nll_hi", "val_loss_smoothed", "grad_norm")
_TUNED = ("architecture", "lr", "seed")
LJ_SPEECH_S = 86_117.0  # of its 13,100 recordings (the data set's own page)
_NOTHING = (float("nan"),) * 3


def final_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the measurements after training, of every kind of weights."""
    return rows[rows["weights"].notna() & rows["step"].isna() & rows["codebook"].isna()]


def results_of(cells: Sequence[PublishedCell]) -> Results:
    """The tables of all published cells; the generated audio of each architecture's best learning rate."""
    models = pd.DataFrame([_model(cell) for cell in cells])
    clips = _tables(cells, "clips.parquet")
    return Results(
        models=models,
        curves=_stacked([_curve(cell) for cell in cells]),
        codebooks=_stacked([_codebooks(cell) for cell in cells]),
        clips=_stacked([t[t["text"] == RIGHT].drop(columns="text") if "text" in t else t for t in clips]),
        spikes=_stacked([_spikes(cell) for cell in cells]),
        gates=_stacked(_tables([cell for cell in cells if "gates.parquet" in cell.files], "gates.parquet")),
        audio=_audio_table(_chosen(cells, models)),
        samples=(),
        texts=_stacked([t[t["weights"] == "ema"] for t in clips if "text" in t]),
    )


def _stacked(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _tables(cells: Sequence[PublishedCell], file: str) -> list[pd.DataFrame]:
    """The table by clip of each cell, with the columns that identify its model."""
    tables = tables_of(cells, file)
    return [with_recordings(table).assign(**_who(cell)) for cell, table in zip(cells, tables, strict=True)]


def _who(cell: PublishedCell) -> dict[str, Any]:
    """What identifies a model; its architecture as `arm_name` has it."""
    return {name: cell.identity[name] for name in _TUNED} | {"architecture": arm_name(cell.identity)}


def _model(cell: PublishedCell) -> dict[str, Any]:
    """One record per model: its size and speed, and each final score of each kind of weights."""
    rows = cell.rows
    plain = rows[rows["metric"].isin(_PLAIN)]
    per_column = rows.loc[rows["metric"] == "flops_per_column", "value"].iloc[0]
    record = {**_who(cell), "cell_key": cell.key, **dict(zip(plain["metric"], plain["value"], strict=True))}
    record["flops_per_token"] = per_column / rows["codebook"].nunique()
    for row in final_scores(rows).to_dict("records"):
        record[f"{row['metric'].removeprefix('final_')}_{row['weights']}"] = row["value"]
    return record


def _curve(cell: PublishedCell) -> pd.DataFrame:
    """Measurements during training."""
    points = cell.rows[cell.rows["step"].notna() & cell.rows["metric"].isin(_POINTS)]
    return points[["metric", "weights", "group", "step", "value"]].assign(**_who(cell))


def _codebooks(cell: PublishedCell) -> pd.DataFrame:
    """One row per kind of weights and codebook, a column per score."""
    rows = cell.rows[cell.rows["codebook"].notna()]
    rows = rows.assign(metric=rows["metric"].str.removeprefix("codebook_"))
    wide = rows.pivot_table(index=["weights", "codebook"], columns="metric", values="value").reset_index()
    return wide.assign(**_who(cell))


def _spikes(cell: PublishedCell) -> pd.DataFrame:
    """How often the gradient of each group of parameters jumped."""
    return cell.rows.loc[cell.rows["metric"] == "grad_spikes", ["group", "value"]].assign(**_who(cell))


def _shown(cells: Sequence[PublishedCell]) -> Iterator[tuple[str, PublishedCell]]:
    """(architecture, its cell of the first seed) of those with samples."""
    first: dict[str, PublishedCell] = {}
    for cell in sorted(cells, key=lambda c: c.identity["seed"]):
        if "spectrogram.png" in cell.files:
            first.setdefault(arm_name(cell.identity), cell)
    yield from first.items()


def _audio_table(cells: Sequence[PublishedCell]) -> pd.DataFrame:
    """Distances and coherence of each architecture's samples (all seeds together), and of real audio; or no row."""
    by_name: dict[str, list[AudioSets]] = {}
    with_audio = [cell for cell in cells if "audio.npz" in cell.files]
    for cell, data in zip(with_audio, files_of(with_audio, "audio.npz"), strict=True):
        by_name.setdefault(arm_name(cell.identity), []).append(AudioSets.read(data))
    if not by_name:
        return pd.DataFrame()
    first = next(iter(by_name.values()))[0]
    records = []
    for embedder in first.embeddings:
        real = first.embeddings[embedder]
        pairs = {REAL: real.get("training")}
        pairs |= {
            name: _joined([s.embeddings[embedder].get("samples") for s in sets]) for name, sets in by_name.items()
        }
        for name, generated in pairs.items():
            values = (
                np.concatenate([s.coherence_samples for s in by_name[name]]) if name != REAL else _by_recording(first)
            )
            record: dict[str, Any] = {"embedder": embedder, "architecture": name}
            record |= _distances(real.get("held_out"), generated)
            records.append(record | dict(zip(_ends("coherence"), _mean_with_ends(values), strict=True)))
    return pd.DataFrame(records)


def _ends(name: str) -> tuple[str, str, str]:
    return name, f"{name}_lo", f"{name}_hi"


def _mean_with_ends(values: np.ndarray) -> tuple[float, float, float]:
    """Mean coherence over samples or recordings, and its 95% t interval (cut at 0 and 1); NaN for fewer than two."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return _NOTHING
    found = units_mean(values)
    lo, hi = np.clip([found.lo, found.hi], 0.0, 1.0).tolist()
    return found.value, lo, hi


def _by_recording(sets: AudioSets) -> np.ndarray:
    """Coherence of real audio: the mean over the clips of each recording."""
    return pd.Series(sets.coherence_real).groupby(sets.coherence_recording).mean().to_numpy(float)


def _joined(parts: Sequence[Embeddings | None]) -> Embeddings | None:
    """The samples of several seeds as one set, whose clips stay separate; None where one seed has no samples."""
    if any(p is None for p in parts):
        return None
    whole = [p for p in parts if p is not None]
    offsets = np.cumsum([0, *(int(p.clip_N.max()) + 1 for p in whole[:-1])])
    clips = np.concatenate([p.clip_N + offset for p, offset in zip(whole, offsets, strict=True)])
    return Embeddings(whole[0].name, whole[0].embedder, np.concatenate([p.x_ND for p in whole]), clips)


def _distances(reference: Embeddings | None, generated: Embeddings | None) -> dict[str, float]:
    if reference is None or generated is None:
        empty = dict(zip(_ends("frechet"), _NOTHING, strict=True))
        return {"vectors": 0, "clips": 0, **empty, "frechet_limit": float("nan"), "kernel": float("nan")}
    frechet, kernel = frechet_distance(reference, generated), kernel_distance(reference, generated, kernel="rbf")
    return {
        "vectors": frechet.n_generated,
        "clips": frechet.clips_generated,
        "reference_vectors": frechet.n_reference,
        "reference_clips": frechet.clips_reference,
        **dict(zip(_ends("frechet"), (frechet.value, *frechet.interval), strict=True)),
        "frechet_limit": float("nan") if frechet.extrapolated is None else frechet.extrapolated,
        "kernel": kernel.value,
    }


def tokens_of_one_codec(cells: Sequence[PublishedCell]) -> list[dict[str, Any]]:
    """What each cell says of its tokens. Raises UserError where they are of several codecs.

    The stand-in codec is one per ledger; cells of ledgers made before that may hold those of several machines.
    """
    tokens = [json.loads(data) for data in files_of(cells, "tokens.json")]
    hashes = sorted({str(t["codec"]["weights_hash"]) for t in tokens})
    if len(hashes) > 1:
        raise UserError(
            f"the cells were trained on tokens of {len(hashes)} different codecs (weights {', '.join(hashes)}), "
            "which no table can compare; give one codec's file with --set codec_weights=FILE, or run them on one "
            "machine"
        )
    return tokens


def write(cells: Sequence[PublishedCell], preset_name: str, study: Study, out: Path) -> list[str]:
    """Write the report folder; returns the headline lines for the screen.

    Raises UserError when the cells were trained on tokens of different codecs.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokens = tokens_of_one_codec(cells)
    results = results_of(cells)
    effects = _text_effects(results, study)
    if len(effects):
        effects.to_csv(out / "texts.csv", index=False)
        text_figure(effects, out / "texts.png")
    names = {c.identity["architecture"] for c in cells}
    _, findings = write_report(
        replace(results, samples=_write_samples(_chosen(cells, results.models), out)),
        out,
        preset=preset_name,
        facts=_facts(cells, tokens[0], study),
        audio_facts=_audio_facts(cells, results, study),
        published=_published(study, tokens[0]["audio_s"]),
        tried={name: study.rates(name) for name in names} if study.rungs else None,
        texts=text_section(effects, _text_facts(tokens[0], study), "texts.png") if len(effects) else [],
    )
    text = labelled("text", [verdict(effects)] if len(effects) else [])
    return [*labelled("answer", findings), *text, *labelled("ran on", _stands_on(banner(study)))]


def _stands_on(lines: Sequence[str]) -> list[str]:
    """What the numbers stand on, of the banner: the audio, and whatever else is not real."""
    return [lines[0], *(line for line in lines[1:] if "random" in line.lower() or "stand-in" in line.lower())]


def _write_samples(cells: Sequence[PublishedCell], out: Path) -> list[tuple[str, str]]:
    """Copy each architecture's spectrogram, WAVs and texts into `out`; returns (architecture, spectrogram's file)."""
    samples = []
    for name, cell in _shown(cells):
        copies = {f"{name}.png": "spectrogram.png", "reference.wav": "reference.wav"}
        wavs = ["sample.wav", *sorted(f for f in cell.files if f.startswith("samples/"))]
        copies |= {f"{name}-{i}.wav": file for i, file in enumerate(wavs)}
        if "samples.txt" in cell.files:
            copies[f"{name}.txt"] = "samples.txt"
        for copy, file in copies.items():
            (out / copy).write_bytes(file_of(cell, file))
        samples.append((name, f"{name}.png"))
    return samples


def _text_effects(results: Results, study: Study) -> pd.DataFrame:
    """See `analysis.codec.texts.text_effects`; no row without a model with text."""
    if results.texts.empty:
        return pd.DataFrame()
    chosen = choose_lr(results.models)
    clips, texts = (at(frame, chosen) for frame in (results.clips, results.texts))
    done = set(texts["architecture"])
    with_text = {name: text_arm(name) for name in study.architectures if text_arm(name) in done}
    return text_effects(clips[clips["weights"] == "ema"], texts, with_text)


def _text_facts(tokens: dict[str, Any], study: Study) -> list[str]:
    left_out = ", ".join(f"{n} {reason}" for reason, n in tokens["left_out"].items()) or "none"
    return [
        "a text is bytes (UTF-8, NFC) through a small bidirectional encoder; chosen blocks attend to it; in training "
        f"{study.text_dropout:g} of the texts are dropped",
        f"clips left out for all models, as they have no text of their own: {left_out}",
    ]


def _chosen(cells: Sequence[PublishedCell], models: pd.DataFrame) -> list[PublishedCell]:
    """The cells of each architecture's best learning rate."""
    picked = set(at(models, choose_lr(models))["cell_key"])
    return [c for c in cells if c.key in picked]


def _facts(cells: Sequence[PublishedCell], tokens: dict[str, Any], study: Study) -> list[str]:
    """What the numbers stand on."""
    codec = tokens["codec"]
    rates = {int(rate): n for rate, n in tokens["source_rates"].items()}
    shown = ", ".join(f"{rate:,} Hz ({n} files looked at)" for rate, n in rates.items()) or "no audio files"
    odd = "; ".join(f"{n} {kind}" for kind, n in tokens["odd"].items()) or "none"
    seeds = sorted({c.identity["seed"] for c in cells})
    lines = [
        *banner(study),
        f"tokens: {tokens['n_tokens']:,} of {tokens['audio_s']:.0f} s, {codec['name']} at {codec['frame_rate_hz']:g} "
        f"Hz with {codec['n_codebooks']} codebooks; {tokens['train_clips']} training and {tokens['held_out_clips']} "
        "held-out clips, split by hash of the recording's id",
        f"sample rate: {shown}; the codec works at {codec['sample_rate']:,} Hz"
        + _resampled(rates, codec["sample_rate"]),
        *_content_line(tokens),
        f"odd recordings: {odd}",
        f"{study.steps} steps of {study.batch_size} clips, seeds {', '.join(map(str, seeds))}"
        + (f", dropout {study.dropout:g}" if study.dropout else ""),
        f"hardware: {recorded(cells, 'hardware')}",
        f"commit: {recorded(cells, 'git_commit')}",
    ]
    missing = _missing(cells, study)
    if missing:
        lines.append(f"INCOMPLETE: no cell yet of {', '.join(missing)}; run the same command to continue")
    if len(seeds) < 2:
        lines.append(f"1 seed: differences between architectures are not tested ({NEEDS_SEEDS})")
    elif len(seeds) < 3:
        lines.append("2 seeds: the noise of training is known from all architectures together, roughly at best")
    return lines


def _content_line(tokens: dict[str, Any]) -> list[str]:
    if "content" not in tokens:
        return []
    return [f"content of the {tokens['n_recordings']:,} recordings: {tokens['content'][:12]} (SHA-256 of their bytes)"]


def _missing(cells: Sequence[PublishedCell], study: Study) -> list[str]:
    """Planned models without a published cell, by architecture and learning rate; with halving none is missed."""
    if study.rungs:
        return []
    found = {tuple(_who(c).values()) for c in cells}
    kinds = study.text or (NONE,)
    grid = [
        (arm_name({"architecture": name, "text": kind}), lr)
        for name in study.architectures
        for kind in kinds
        for lr in study.rates(name)
    ]
    return [f"{arm} at lr {lr:g}" for arm, lr in grid if any((arm, lr, s) not in found for s in study.seeds)]


def _resampled(rates: dict[int, int], rate: int) -> str:
    if not rates:
        return ""
    lower = [r for r in rates if r < rate]
    if lower:
        return f", resampled; above {min(lower) / 2:,.0f} Hz it holds nothing where files are at {min(lower):,} Hz"
    return ", no resampling" if set(rates) == {rate} else ", resampled"


def _audio_facts(cells: Sequence[PublishedCell], results: Results, study: Study) -> list[str]:
    if results.audio.empty:
        return []
    first = next(c for c in cells if "audio.npz" in c.files)
    sets = AudioSets.read(file_of(first, "audio.npz"))
    real = results.audio[results.audio["architecture"] == REAL].iloc[0]
    window = sets.coherence_window_s
    return [
        f"samples of {sets.sample_s:g} s from nothing, EMA weights, temperature {SAMPLING.temperature:g}, top-k "
        f"{SAMPLING.top_k}, all seeds of the chosen learning rate; real clips are cut to the same length, and "
        "both have "
        "been through the codec" + ("; models with text are given texts of held-out clips" if study.text else ""),
        f"reference set of the distances: {int(real.get('reference_clips', 0))} held-out recordings "
        f"({int(real.get('reference_vectors', 0))} vectors); `{REAL}` is as many training clips against the "
        "same reference, clips of one recording as one: what two sets of real audio differ by",
        "95% intervals by the jackknife over samples and recordings speak of these trained models, whose samples are "
        f"pooled over their seeds, and of no other training; none for fewer than {LEAST_CLIPS} of a set; the Fréchet "
        "distance at finite N is biased upwards, and its interval is that of the value at infinite N, from which the "
        "jackknife has taken that bias; the kernel distance (squared MMD, Gaussian kernel) is unbiased, and may be "
        "below 0; it has no interval, as none that was tried covers where the sets differ in spread",
        "log-mel statistics hear timbre and level, neither words nor voice",
        f"coherence: cosine of code histograms in windows of {window:g} s, {window / 2:g} s apart, that share "
        "no frame; "
        f"real audio: {len(sets.coherence_real)} clips of both sides at least as long as a sample",
    ]


def _published(study: Study, audio_s: float = LJ_SPEECH_S) -> Published | None:
    """The published numbers of the study's scale, and the reason why they do not compare with ours.

    audio_s: how long the audio is, as a path alone does not tell what lies there.
    """
    if study.scale == "music":
        caveat = ""
        if (study.corpus, study.codec) != ("fma", "dac"):
            caveat = f"{study.corpus} coded by {study.codec} is not FMA coded by DAC"
        elif study.codec_weights == "random":
            caveat = "DAC has random weights here"
        return Published("music", caveat)
    if study.scale != "speech":
        return None
    caveat = ""
    if (study.corpus, study.codec) != ("ljspeech", "encodec"):
        caveat = f"{study.corpus} coded by {study.codec} is not LJ Speech coded by EnCodec"
    elif study.codec_weights == "random":
        caveat = "EnCodec has random weights here"
    elif abs(audio_s / LJ_SPEECH_S - 1) > 0.02:
        caveat = f"the audio at {study.audio_path} lasts {audio_s / 3600:.1f} h, LJ Speech {LJ_SPEECH_S / 3600:.1f} h"
    elif study.text:
        caveat = "a text study takes whole sentences, not chunks of 8 s"
    return Published("speech", caveat, CURVE_CLIPS)
