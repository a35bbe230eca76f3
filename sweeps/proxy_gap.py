"""The SAE proxy gap: does reconstruction fidelity rank sparse autoencoders as the language model itself does?

python sweeps/proxy_gap.py                    stand-in language models, minutes, offline
python sweeps/proxy_gap.py --preset smollm2   a real pretrained 135M language model, offline
python sweeps/proxy_gap.py --preset fast2     the study's grid on Pythia and the Pile
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder, whose rooms are no packages
    from sweeps.launch.same_code import own_code

    own_code()  # before the sweep is imported, so that it is the digest of what runs
    from sweeps.launch.command import main
    from sweeps.sae.sweep import SWEEP

    sys.exit(main(SWEEP))
