"""Audio-token language models: do hybrids learn codec tokens better than a transformer or Mamba of the same size?

python sweeps/codec_lm.py                         synthetic speech, a stand-in codec, small models: minutes
python sweeps/codec_lm.py --preset asterisk       real speech (benchmarks/fetch_test_audio.py), the same small models
python sweeps/codec_lm.py --preset speech_a100 --set audio_path=LJSpeech-1.1     the study's 21.9M models (GPU)
python sweeps/codec_lm.py --preset music_a100 --set audio_path=FMA               the study's 294M models (GPU)
python sweeps/codec_lm.py --preset text_local     the same with and without each clip's transcript: does it help?
python sweeps/codec_lm.py --sample runs/ledger/codec_lm/2/KEY --seconds 4 --n 4 --out DIR   WAVs of a finished model
python sweeps/codec_lm.py --tokenise --preset speech_a100 --set audio_path=LJSpeech-1.1 --actors 4   tokens beforehand
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder, whose rooms are no packages
    from sweeps.launch.same_code import own_code

    own_code()  # before the sweep is imported, so that it is the digest of what runs
    from sweeps.codec.sweep import SWEEP
    from sweeps.launch.command import main

    names = {argument.split("=")[0] for argument in sys.argv[1:]}
    if "--sample" in names:
        from sweeps.codec.sample import main as sample

        sys.exit(sample(sys.argv[1:]))
    if "--tokenise" in names:
        from sweeps.codec.tokenise import main as tokenise

        sys.exit(tokenise(sys.argv[1:]))
    sys.exit(main(SWEEP))
