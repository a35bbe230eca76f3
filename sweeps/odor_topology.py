"""Topology audit: does persistent H1 survive metric choice, subsampling, matched nulls and ordinary baselines?

python sweeps/odor_topology.py                                  embedded odorants and known shapes, minutes
python sweeps/odor_topology.py --set table=curated              the 4,983-molecule table (downloaded, or table=PATH)
python sweeps/odor_topology.py --preset paper --set table=curated   the published protocol
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder, whose rooms are no packages
    from sweeps.launch.same_code import own_code

    own_code()  # before the sweep is imported, so that it is the digest of what runs
    from sweeps.launch.command import main
    from sweeps.topology.sweep import SWEEP

    sys.exit(main(SWEEP))
