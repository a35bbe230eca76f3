"""Columns of the proxy gap's tables, and the limits that their names stand for; no torch, so reports start fast."""

from __future__ import annotations

TOKEN_SUMS = ("sse", "sst", "sum_sq", "cos_sum", "rel_sum", "swd_sum", "abs_sum", "legacy_sum")
LOSSES = ("loss_orig", "loss_recon", "loss_zero")
SEQUENCE_COLUMNS = ("sequence", "n_tokens", *LOSSES, *TOKEN_SUMS)

SINK_NORM = 3.0
SINK_SHARE = 0.02
TOP_SHARE = 0.01
DIRECTIONS = (1, 2, 4, 8)  # how many leading eigenvectors are set apart
SETS = ("no_first", "no_first4", "no_huge", "no_sinks")
SEQUENCE_SUMS = ("sse_no_sinks", "sst_no_sinks")
LAYER_COLUMNS = (
    *("pr_no_sinks", "sst_share_first", "sst_share_first4", "sst_share_top1pct"),
    *(f"sst_share_eig{m}" for m in DIRECTIONS),
    *("sink_share", "sst_share_sinks", "r2_constant", "sst_token", "energy_token"),
)
# task-relevant dimension of a layer, where it was asked for (analysis.sae.task_dimension)
INFORMATION_COLUMNS = ("k_mi", "k_mi_lo", "k_mi_hi", "k_mi_one_shot", "mi_nats", "mi_ceiling")
CONTROLS = (
    *("r2_no_sinks", "r2_no_first", "r2_no_first4", "r2_no_huge"),
    *(f"r2_deflated{m}" for m in DIRECTIONS),
    "r2_whitened",
)

IDENTITY = ("model", "layer", "depth", "k", "seed", "tokens")
# R² and PR without the tokens and directions that own the variance; older ledgers lack them
AUDIT_COLUMNS = ("r2_no_sinks", "pr_no_sinks", "sst_share_first", "sst_share_top1pct", *CONTROLS[1:])
# the ladder of proxies beyond R² (analysis.sae.rungs): per sequence, and per cell; older ledgers lack them
RUNG_SUMS = ("first_order", "fisher", "fisher_diag", "fisher_sampled", "kl", "attention_plan")
RUNG_COLUMNS = (
    *("kl", "fisher", "fisher_diag", "fisher_sampled", "fisher_deviation"),
    *("first_order", "first_order_slope", "first_order_correlation", "first_order_signs"),
    *("attention_plan", "attention_cost"),
)
# how many features fire, and how often (analysis.sae.budget.FeatureCounts.density); older ledgers lack them
FIRING_COLUMNS = ("l0", "density_median", "dense_share")
# of cells that ask for it alone (analysis.sae.legibility): means over labels; features in a sparse probe
PROBED_K = (1, 2, 5)
LEGIBILITY = (*(f"k{k}" for k in PROBED_K), "dense", "mdl", "mdl_dense")
LEGIBILITY_COLUMNS = tuple(f"legibility_{name}" for name in LEGIBILITY)
LATER_COLUMNS = (*AUDIT_COLUMNS, *RUNG_COLUMNS, *FIRING_COLUMNS)
CELL_COLUMNS = (
    *IDENTITY,
    *("r2", "r2_legacy", "r2_energy", "ce_rec", "ce_rec_lo", "ce_rec_hi", "ce_loss_score", "mse", "cosine"),
    *("relative_error", "alive", "swd", "abs_gdelta", "nmse", "rate_bits", "rate_bits_entropy"),
    *("pr", "pr_deflated", *LOSSES, "d_model", "d_sae", "cell_key", *LATER_COLUMNS),
)
NUMBERS = tuple(name for name in CELL_COLUMNS if name not in (*IDENTITY, "cell_key"))
CONFIGURATION = ("model", "depth", "layer", "k", "tokens")
