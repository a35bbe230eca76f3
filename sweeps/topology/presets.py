"""The presets of the topology audit."""

from __future__ import annotations

from collections.abc import Mapping

from sweeps.topology.cells import Audit

PRESETS: Mapping[str, Audit] = {
    "audit": Audit(
        study="audit",
        clouds=("circle", "figure_eight", "torus", "gaussian_blob"),
        draws=1000,
        null_stream="joint",
        full_table=True,
        full_draws=199,
        representations=("bits_r4", "bits_r2", "counts_r4", "physchem", "pom_0", "pom_1"),
    ),
    "paper": Audit(
        study="paper",
        routes=("direct", "landmark"),
        null_stream="published",
        representations=("bits_r4", "bits_r2", "counts_r4", "physchem", "pom_0"),
    ),
    "bottleneck": Audit(
        study="bottleneck",
        draws=1600,
        null_stream="joint",
        representations=("bits_r4", "pca256", "rp256_0", "rp256_1", "rp256_2", "ae256_0", "ae256_1", "ae256_2"),
    ),
    "ensemble": Audit(study="ensemble", draws=4, representations=tuple(f"pom_{m}" for m in range(10))),
    "utility": Audit(study="utility", representations=("bits_r4", "counts_r4", "physchem", "pom_0")),
}
