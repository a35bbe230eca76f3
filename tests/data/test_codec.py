from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from data.codec import Codec, CodecSpec, DACCodec, EncodecCodec, MelVQCodec, MissingCodecWeights, hash_tensors
from data.melvq import MelVQ, MelVQSpec


def noise(n: int, seed: int = 0, b: int = 1) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal((b, n))).astype(np.float32)


@pytest.fixture(scope="module")
def melvq() -> MelVQCodec:
    generator = torch.Generator().manual_seed(0)
    spec = MelVQSpec(n_mels=20, n_codebooks=3, codebook_size=32)
    return MelVQCodec(MelVQ(spec, torch.zeros(20), torch.randn(3, 32, 20, generator=generator)))


@pytest.fixture(scope="module")
def encodec() -> Codec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CodecSpec(name="encodec", weights="random").load()


@pytest.fixture(scope="module")
def small_dac() -> DACCodec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dac.model import DAC

        torch.manual_seed(0)
        return DACCodec(DAC(encoder_dim=4, encoder_rates=[2, 4, 8, 8], decoder_dim=64), weights="random")


@pytest.mark.parametrize("name", ["melvq", "encodec", "small_dac"])
def test_interface_contract(name: str, request: pytest.FixtureRequest) -> None:
    codec: Codec = request.getfixturevalue(name)
    n = 10 * codec.hop + 1
    codes = codec.encode(noise(n, b=2), codec.sample_rate)
    assert codes.dtype == np.uint16
    assert codes.shape == (2, codec.n_codebooks, 11)
    assert codes.max() < codec.codebook_size
    assert len(np.unique(codes)) > codec.n_codebooks  # random weights still give tokens that vary
    assert not np.array_equal(codes[0], codes[1])
    wave = codec.decode(codes)
    assert wave.dtype == np.float32
    assert wave.shape == (2, 11 * codec.hop)
    assert np.isfinite(wave).all()
    assert np.array_equal(codec.encode(noise(n, b=2), codec.sample_rate), codes)
    assert codec.caveat
    assert codec.describe()["weights_hash"] == codec.weights_hash


def test_published_rates(encodec: Codec) -> None:
    assert (encodec.n_codebooks, encodec.codebook_size, encodec.sample_rate) == (8, 1024, 24_000)
    assert encodec.frame_rate_hz == 75.0
    assert encodec.bits_per_second == 6_000.0
    assert encodec.caveat.startswith("encodec with RANDOM weights")


@pytest.mark.slow
def test_dac_at_its_real_size_and_from_a_file(tmp_path: Path) -> None:
    codec = CodecSpec(name="dac", weights="random").load()
    assert (codec.n_codebooks, codec.codebook_size, codec.sample_rate, codec.hop) == (9, 1024, 44_100, 512)
    assert abs(codec.frame_rate_hz - 86.13) < 0.01
    assert abs(codec.bits_per_second - 7_752) < 1
    assert isinstance(codec, DACCodec)
    codec.model.save(tmp_path / "dac.pth", package=False)
    loaded = CodecSpec(name="dac", weights=str(tmp_path / "dac.pth")).load()
    assert loaded.weights == "file"
    assert loaded.weights_hash == codec.weights_hash
    wave = noise(5_000)
    assert np.array_equal(loaded.encode(wave, 44_100), codec.encode(wave, 44_100))


def test_a_dac_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from dac.model import DAC

    kwargs = {"encoder_dim": 4, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 64}
    state = DAC(**kwargs).state_dict()
    first = next(iter(state))
    for tensors, said in (
        (
            {f"module.{k}": v for k, v in state.items()},
            f"lacks {len(state)} of the model's tensors and has {len(state)}",
        ),
        (state | {"more": torch.zeros(1)}, "lacks 0 of the model's tensors and has 1 besides, more among them"),
        ({k: v for k, v in state.items() if k != first}, f"lacks 1 of the model's tensors and has 0 besides, {first}"),
    ):
        torch.save({"state_dict": tensors, "metadata": {"kwargs": kwargs}}, tmp_path / "dac.pth")
        with pytest.raises(ValueError, match=f"does not hold the weights of a DAC: it {said}"):
            CodecSpec(name="dac", weights=str(tmp_path / "dac.pth")).load()


def test_encodec_from_a_file_is_the_same_codec(encodec: Codec, tmp_path: Path) -> None:
    assert isinstance(encodec, EncodecCodec)
    torch.save(encodec.model.state_dict(), tmp_path / "e.th")
    loaded = CodecSpec(name="encodec", weights=str(tmp_path / "e.th")).load()
    assert loaded.weights_hash == encodec.weights_hash
    assert loaded.caveat == ""
    other = CodecSpec(name="encodec", weights="random", seed=1).load()
    assert other.weights_hash != encodec.weights_hash
    torch.save({"a": torch.zeros(3)}, tmp_path / "wrong.th")
    with pytest.raises(ValueError, match="does not hold the weights of EnCodec"):
        CodecSpec(name="encodec", weights=str(tmp_path / "wrong.th")).load()


@pytest.mark.parametrize("name", ["encodec", "dac"])
def test_a_failed_download_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import requests

    def refuse(*_args: object, **_how: object) -> None:
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(MissingCodecWeights, match=r"--codec-weights random.*--codec melvq"):
        CodecSpec(name=name).load()


def test_other_missing_weights() -> None:
    with pytest.raises(MissingCodecWeights, match="does not exist"):
        CodecSpec(name="dac", weights="nowhere.pth").load()
    with pytest.raises(MissingCodecWeights, match=r"data\.melvq\.train"):
        CodecSpec(name="melvq").load()
    with pytest.raises(ValueError, match="is not one of dac, encodec, melvq"):
        CodecSpec(name="mp3").load()


def test_melvq_file_round_trip(melvq: MelVQCodec, tmp_path: Path) -> None:
    loaded = CodecSpec(name="melvq", weights=str(melvq.model.save(tmp_path / "m.npz"))).load()
    assert loaded.weights_hash == melvq.weights_hash
    assert "stand-in" in loaded.caveat


def test_bad_waves_and_codes(melvq: MelVQCodec) -> None:
    with pytest.raises(ValueError, match="wave at 22050 Hz, but melvq codes 16000 Hz"):
        melvq.encode(noise(4_000), 22_050)
    with pytest.raises(ValueError, match="clip of 255 samples is shorter than one frame"):
        melvq.encode(noise(255), 16_000)
    with pytest.raises(ValueError, match=r"expected \[B, N\]"):
        melvq.encode(noise(4_000)[0], 16_000)
    bad = noise(4_000)
    bad[0, 7] = np.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        melvq.encode(bad, 16_000)
    with pytest.raises(ValueError, match="code 33 is outside melvq's codebooks of 32"):
        melvq.decode(np.full((1, 3, 4), 33))
    with pytest.raises(ValueError, match=r"expected \[B, 3, T >= 1\]"):
        melvq.decode(np.zeros((1, 2, 4), dtype=np.int64))


def test_hash_sees_names_types_shapes_and_values() -> None:
    a = {"w": torch.arange(4.0), "b": torch.zeros(0)}
    assert hash_tensors(a) == hash_tensors(dict(reversed(a.items())))
    changed = [
        {"v": a["w"], "b": a["b"]},
        {"w": a["w"].reshape(2, 2), "b": a["b"]},
        {"w": a["w"] + 1e-6, "b": a["b"]},
        {"w": a["w"].double(), "b": a["b"]},
    ]
    assert len({hash_tensors(c) for c in [a, *changed]}) == 5


def test_random_weights_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    seen = set()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            seen.add(str(CodecSpec(name="encodec", weights="random").load().describe()))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
