"""Figures of the audio-token language models: spectrograms, curves, codebooks, differences, gradients.

Shape suffixes: N samples.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from analysis import plots

_WINDOW_S = 0.032
_FLOOR_DB = -80.0


def spectrogram_png(waves: Mapping[str, npt.ArrayLike], sample_rate: int) -> bytes:
    """A PNG with one spectrogram (dB under the loudest bin, kHz over s) a wave_N, titled by its name.

    Raises ValueError for a wave shorter than one 32 ms window.
    """
    n_fft = 2 ** round(math.log2(_WINDOW_S * sample_rate))
    with plots.style():
        figure, axes = plots.panels(len(waves), 1, width=7.0, height=1.9, sharex=False)
        for axis, (title, wave) in zip(axes[:, 0], waves.items(), strict=True):
            wave_N = np.asarray(wave, dtype=np.float64)
            if len(wave_N) < n_fft:
                raise ValueError(f"{title}: {len(wave_N)} samples are shorter than one window of {n_fft}")
            frames = np.lib.stride_tricks.sliding_window_view(wave_N, n_fft)[:: n_fft // 4] * np.hanning(n_fft)
            power = np.abs(np.fft.rfft(frames, axis=1)).T ** 2
            decibels = 10 * np.log10(np.maximum(power / max(power.max(), 1e-20), 10 ** (_FLOOR_DB / 10)))
            extent = (0.0, len(wave_N) / sample_rate, 0.0, sample_rate / 2000)
            axis.imshow(decibels, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=_FLOOR_DB, vmax=0)
            axis.set_title(title)
            axis.set_ylabel("kHz")
            axis.grid(False)
        axes[-1, 0].set_xlabel("s")
        sink = io.BytesIO()
        figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()
