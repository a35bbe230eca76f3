"""The source study's published numbers, as data: what the report compares ours with.

Budgets in training tokens; alive in percent of features; deltas are pythia-410m minus pythia-70m.
"""

from __future__ import annotations

SMALL, MIDDLE, LARGE = "pythia-70m", "pythia-160m", "pythia-410m"
PRESETS = ("fast2", "fast3", "phase2", "budget_k32", "bridge")
TEN, FIFTY, HUNDRED = 10_000_000, 50_000_000, 100_000_000

N_LAYERS = {SMALL: 6, MIDDLE: 12, LARGE: 24}
K_STAR_TARGETS = (0.85, 0.90)

# (model, depth, k, tokens) → R², CE_rec, its 95% interval
HEADLINE = {
    (SMALL, "mid", 8, TEN): (0.807, 0.340, (0.169, 0.469)),
    (LARGE, "mid", 8, TEN): (0.961, 0.235, (0.050, 0.382)),
}

# (depth, k, tokens) → ΔR², ΔCE_rec, of sweep fast2
DELTA = {
    ("mid", 8, TEN): (0.154, -0.106),
    ("mid", 16, TEN): (0.112, -0.068),
    ("mid", 32, TEN): (0.084, -0.017),
    ("mid", 64, TEN): (0.057, -0.027),
    ("mid", 128, TEN): (0.036, -0.032),
    ("mid", 256, TEN): (0.017, -0.037),
}

# (model, k) → R², CE_rec, cosine, alive %, of sweep fast3 (mid, 10M tokens)
FAST3 = {
    (SMALL, 8): (0.810, 0.372, 0.856, 15.2),
    (MIDDLE, 8): (0.907, 0.331, 0.869, 12.9),
    (LARGE, 8): (0.961, 0.269, 0.809, 11.9),
    (SMALL, 16): (0.855, 0.580, 0.893, 37.1),
    (MIDDLE, 16): (0.924, 0.538, 0.908, 28.5),
    (LARGE, 16): (0.968, 0.530, 0.883, 25.4),
    (SMALL, 32): (0.891, 0.729, 0.920, 63.2),
    (MIDDLE, 32): (0.938, 0.696, 0.932, 51.1),
    (LARGE, 32): (0.974, 0.723, 0.919, 51.4),
    (SMALL, 64): (0.922, 0.836, 0.944, 83.8),
    (MIDDLE, 64): (0.951, 0.809, 0.934, 71.2),
    (LARGE, 64): (0.979, 0.814, 0.901, 65.0),
}

# depth → Pearson correlation of R² and CE_rec over sweep fast2: pooled, within fixed k
CORRELATION = {"early": (0.907, 0.353), "mid": (0.474, -0.943), "late": (0.702, 0.976)}

# (model, depth, target) → k*, of sweep fast2
K_STAR = {
    (SMALL, "early", 0.85): 40.6,
    (LARGE, "early", 0.85): 55.0,
    (SMALL, "early", 0.90): 62.0,
    (LARGE, "early", 0.90): 106.9,
    (SMALL, "mid", 0.85): 71.2,
    (LARGE, "mid", 0.85): 98.0,
    (SMALL, "mid", 0.90): 116.5,
    (LARGE, "mid", 0.90): 187.6,
}

# (depth, k, tokens) → seeds, ΔCE_rec, its 95% interval or None, ΔR², of sweep phase2
BUDGET_DELTA: dict[tuple[str, int, int], tuple[int, float, tuple[float, float] | None, float]] = {
    ("mid", 8, TEN): (4, -0.099, (-0.117, -0.082), 0.150),
    ("mid", 8, FIFTY): (1, 0.018, None, 0.108),
    ("mid", 8, HUNDRED): (3, 0.009, (0.004, 0.013), 0.096),
}

# (model, k, tokens) → what the study printed of single mid-depth cells at longer budgets
BUDGET_CELL: dict[tuple[str, int, int], dict[str, float]] = {
    (SMALL, 32, HUNDRED): {"ce_rec": 0.898, "alive": 94.7},
    (LARGE, 32, HUNDRED): {"ce_rec": 0.920, "alive": 94.1},
    (SMALL, 8, FIFTY): {"ce_rec": 0.670, "ce_rec_lo": 0.629, "ce_rec_hi": 0.706, "r2": 0.863, "alive": 44.2},
}

# (model, layer) → raw participation ratio, PR / d_model
PARTICIPATION_RATIO = {
    (SMALL, 1): (51.914, 0.101),
    (SMALL, 3): (3.961, 0.008),
    (LARGE, 4): (111.967, 0.109),
    (LARGE, 5): (2.045, 0.002),
    (LARGE, 12): (1.177, 0.001),
}

# model → mse·d_model, Σ‖a − ā‖² a token, R² (mid, k=8, 10M): the study's check on its definitions
DEFINITION_CHECK = {SMALL: (43.7, 226.7, 0.807), LARGE: (161.3, 4131.1, 0.961)}
