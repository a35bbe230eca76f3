"""What audio.npz of a published cell holds, read without a model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis.codec.audio_distance import Embeddings
from models.codec.sampling import Sampling

SAMPLING = Sampling(temperature=0.9, top_k=100)
SETS = ("samples", "held_out", "training")
_LENGTHS = ("sample_s", "coherence_window_s")


@dataclass(frozen=True)
class AudioSets:
    """What audio.npz of a cell holds: by embedder's name, the embeddings of each of SETS; coherences of the samples and
    of real clips at least as long, and which recording each of these was cut from; the length of a sample and the
    coherence's window in seconds."""

    embeddings: Mapping[str, Mapping[str, Embeddings]]
    coherence_samples: npt.NDArray[np.float64]
    coherence_real: npt.NDArray[np.float64]
    coherence_recording: npt.NDArray[np.int64]
    sample_s: float
    coherence_window_s: float

    @classmethod
    def read(cls, data: bytes) -> AudioSets:
        """From the file's bytes; a set without two clips of a second is missing from its embedder's."""
        with np.load(io.BytesIO(data), allow_pickle=False) as a:
            found = {
                str(name): {
                    kind: Embeddings(kind, str(name), a[f"{kind}_{j}_x"], a[f"{kind}_{j}_clip"])
                    for kind in SETS
                    if f"{kind}_{j}_x" in a
                }
                for j, name in enumerate(a["embedders"])
            }
            real = a["coherence_real"]  # older cells do not name recordings: each clip is one of its own
            whose = a["coherence_real_recording"] if "coherence_real_recording" in a else np.arange(len(real))
            return cls(found, a["coherence_samples"], real, whose, *(float(a[n]) for n in _LENGTHS))
