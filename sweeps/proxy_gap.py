"""The SAE proxy gap: does reconstruction fidelity rank sparse autoencoders as the language model itself does?

python sweeps/proxy_gap.py                    stand-in language models, minutes, offline
python sweeps/proxy_gap.py --preset smollm2   a real pretrained 135M language model, offline
python sweeps/proxy_gap.py --preset fast2     the study's grid on Pythia and the Pile
python sweeps/proxy_gap.py --preset scale --set weights=DIR     one family at two scales, offline
python sweeps/proxy_gap.py --set models=Qwen/Qwen2.5-0.5B,DIR,FILE.gguf --set depths=mid     any decoder-only model
python sweeps/proxy_gap.py --tokenise --set models=… --set text=OWNER/NAME     documents as tokens, beforehand
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

    if "--tokenise" in {argument.split("=")[0] for argument in sys.argv[1:]}:
        from sweeps.sae.tokenise import main as tokenise

        sys.exit(tokenise(sys.argv[1:]))
    sys.exit(main(SWEEP))
