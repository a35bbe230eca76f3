"""What a transcript is worth: paired differences recover what was planted, and the verdict follows them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.codec.texts import NO_TEXT, REST, SHUFFLED, WORTH, text_effects, text_section, verdict
from analysis.crossed import NEEDS_SEEDS

N, TOKENS = 60, 100


def scores(
    architecture: str, worth: float, seeds: tuple[int, ...] = (0, 1, 2), text: str | None = None
) -> pd.DataFrame:
    """Clips of very different difficulty, the same for all models; a model is `worth` nats per token better, and a bit
    of its own on every clip."""
    clip_C = np.random.default_rng(0).normal(6.0, 1.0, N)
    parts = []
    for seed in seeds:
        own_C = np.random.default_rng([3, seed, *architecture.encode(), *(text or "").encode()]).normal(0, 0.01, N)
        nll = (clip_C - worth + own_C) * TOKENS
        part = pd.DataFrame({"clip_id": [f"c{i}" for i in range(N)], "nll": nll, "tokens": TOKENS})
        parts.append(part.assign(architecture=architecture, seed=seed, **({"text": text} if text else {})))
    return pd.concat(parts, ignore_index=True)


def study(worth: float, read: float, seeds: tuple[int, ...] = (0, 1, 2)) -> pd.DataFrame:
    clips = pd.concat([scores("x", 0.0), scores("x_text", worth, seeds)])
    kinds = {"right": worth, "shuffled": worth - read, "no_text": worth - read / 2}
    texts = pd.concat([scores("x_text", value, seeds, kind) for kind, value in kinds.items()])
    return text_effects(clips, texts, {"x": "x_text"})


def test_planted_differences_are_found_although_clips_differ_far_more() -> None:
    effects = study(worth=0.06, read=0.1).set_index("contrast")
    for contrast, planted in {WORTH: -0.06, SHUFFLED: -0.1, NO_TEXT: -0.05, REST: -0.01}.items():
        row = effects.loc[contrast]
        assert row["difference"] == pytest.approx(planted, abs=0.005)
        assert row["lo"] < row["difference"] < row["hi"] < 0
        assert row["hi"] - row["lo"] < 0.02
        assert (row["n_units"], row["n_seeds"], row["needs"]) == (N, 3, "")


@pytest.mark.parametrize(
    ("worth", "read", "words"),
    [
        (0.05, 0.1, ["the transcript helps x", "the right text is better than another clip's for x"]),
        (0.09, 0.1, ["the transcript helps x", "part of the gain is not the text's (no text - none) for x"]),
        (0.05, 0.0, ["x: better with text conditioning, not shown to be by the text", "which text is given to x"]),
        (0.0, 0.0, ["does not help measurably: x", "no measurable difference which text is given to x"]),
        (-0.05, 0.1, ["the model of the same size without text is better for x", "better than another clip's for x"]),
    ],
)
def test_the_verdict_says_what_the_differences_say(worth: float, read: float, words: list[str]) -> None:
    effects = study(worth, read)
    said = verdict(effects)
    assert all(part in said for part in words), said
    assert f"**{said}.**" in text_section(effects, ["fact"], "f.png")


def test_seeds_that_only_one_of_the_models_has_are_left_out() -> None:
    effects = study(worth=0.05, read=0.1, seeds=(1, 7)).set_index("contrast")
    assert effects["n_seeds"].to_dict() == {WORTH: 1, SHUFFLED: 2, NO_TEXT: 2, REST: 1}
    assert effects["needs"].to_dict() == {WORTH: NEEDS_SEEDS, SHUFFLED: "", NO_TEXT: "", REST: NEEDS_SEEDS}
    assert WORTH not in set(study(worth=0.05, read=0.1, seeds=(8,))["contrast"])


def test_one_seed_speaks_of_its_trained_model_alone() -> None:
    effects = study(worth=0.06, read=0.1, seeds=(0,))
    by_contrast = effects.set_index("contrast")
    for contrast in (WORTH, REST):  # two trainings
        row = by_contrast.loc[contrast]
        assert row[["lo", "hi", "p", "p_holm"]].isna().all()
    for contrast in (SHUFFLED, NO_TEXT):  # one model
        row = by_contrast.loc[contrast]
        assert row["hi"] < 0
        assert row["p_holm"] < 0.001
    said = verdict(effects)
    assert "the transcript helps x" not in said
    assert "whether the transcript helps is not tested for x (needs ≥ 2 seeds)" in said
    assert "the right text is better than another clip's for x" in said
    assert "one seed: which text is better is said of this trained model alone (x)" in said
    assert "-0.0" in (table := "\n".join(text_section(effects, [], "f.png")))
    assert f"[–: {NEEDS_SEEDS}] |" in table


def test_several_clips_of_one_recording_count_once() -> None:
    one = {"x": scores("x", 0.0), "x_text": scores("x_text", 0.05)}
    texts = pd.concat([scores("x_text", 0.05, text=kind) for kind in ("right", "shuffled", "no_text")])
    whole = [t.assign(recording_id=t["clip_id"].str[1:].astype(int) // 6) for t in (pd.concat(one.values()), texts)]
    effects = text_effects(*whole, {"x": "x_text"})
    assert set(effects["n_units"]) == {10}


def test_other_clips_are_refused() -> None:
    texts = pd.concat([scores("x_text", 0, (0,), kind) for kind in ("right", "shuffled", "no_text")])
    with pytest.raises(ValueError, match="text - none of x: of 60 and 59 scored clips 59 are in both"):
        text_effects(pd.concat([scores("x", 0)[1:], scores("x_text", 0, (0,))]), texts, {"x": "x_text"})
