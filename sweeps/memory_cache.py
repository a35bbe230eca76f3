"""Memory caching: why did the gate stay shut when the source study scaled it up, and what is it worth?

python sweeps/memory_cache.py                              one variable at a time on synthetic speech: minutes
python sweeps/memory_cache.py --preset thorough            the same with enough steps for verdicts
python sweeps/memory_cache.py --set variables=segment,lr   only these
python sweeps/memory_cache.py --set segment=32,16,8        other values, the base setting's first
python sweeps/memory_cache.py --preset mc_a100 --set audio_path=FMA      the study's 48M and 95M models (GPU)
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder, whose rooms are no packages
    from sweeps.launch.same_code import own_code

    own_code()  # before the sweep is imported, so that it is the digest of what runs
    from sweeps.caching.sweep import SWEEP
    from sweeps.launch.command import main

    sys.exit(main(SWEEP))
