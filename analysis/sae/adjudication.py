"""The last section of the proxy-gap report: the verdicts on the study's hypotheses."""

from __future__ import annotations

from analysis.sae.measured import Study
from analysis.sae.tables import Section


def adjudication(study: Study) -> Section:
    """Every hypothesis with its inputs, rule and verdict; the conclusion; the thresholds and their hash."""
    found = study.adjudication
    title = "Adjudication"
    if found is None:
        return Section(title, needs="a grid that was measured by `measure`")
    rows = [
        {"hypothesis": f"{v.name}: {v.statement}", "inputs": v.inputs, "rule": v.rule, "verdict": str(v)}
        for v in found.verdicts
    ]
    lines = [
        f"**{found.conclusion}**",
        f"Thresholds {found.thresholds.digest}: {found.thresholds}. They are registered with the preset. The order is "
        "H0, H1, H2, H3; H2 and H3 are not read until H0 is decided. “Undetermined” and “blocked” are answers. How "
        "often a verdict is wrong: calibration.md.",
        *found.notes,
    ]
    return Section(title, rows, lines)
