"""The compiled decoding step against the model's own step: logits, states, weights in both precisions, errors."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.codec.compiled.products import pack, padded, product
from models.codec.compiled.step import CompiledStep
from models.codec.decoding import Backend, decoding, decoding_backend
from models.codec.model import CodecLM
from models.codec.names import build_lm
from models.codec.sampling import Sampling, draw, generate

ODD = {"d_model": 40, "d_ff": 50, "head_k": 5, "head_v": 9, "n_kv_heads": 1}  # nothing divides by 16
STEPS = 9


def _with_rounded_projections(model: CodecLM) -> CodecLM:
    """The same model computing in float32 with projections that bfloat16 can hold."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(module.weight.bfloat16())
        rounded.heads.copy_(rounded.heads.bfloat16())
    return rounded


def _panels(matrix: torch.Tensor) -> torch.Tensor:
    """[..., N, D] -> [..., N/16, D, 16], both padded by zeros to multiples of 16."""
    *batch, n, d = matrix.shape
    out = torch.zeros(*batch, padded(n) // 16, padded(d), 16)
    for row in range(n):
        out[..., row // 16, :d, row % 16] = matrix[..., row, :]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_are_those_of_float64_and_do_not_depend_on_neighbours(dtype):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 37, generator=generator) for n in (5, 33)]
    x = torch.zeros(15, padded(37))
    x[:, :37] = torch.randn(15, 37, generator=generator)
    packed = pack(parts, dtype)
    assert packed.nbytes == 64 * 48 * dtype.itemsize
    together = np.full((15, 80), -1, np.float32)
    product(packed, x.numpy(), together)
    for part, at in zip(parts, (0, 16), strict=True):
        expected = x[:, :37].double() @ part.to(dtype).double().t()
        np.testing.assert_allclose(together[:, at : at + len(part)], expected, rtol=0, atol=2e-5)
        assert (together[:, at + len(part) : at + padded(len(part))] == 0).all()
    assert (together[:, 64:] == -1).all()
    for rows in (1, 2, 3, 4, 7, 8):
        some = np.zeros((rows, 64), np.float32)
        product(packed, x[-rows:].contiguous().numpy(), some)
        assert np.array_equal(some, together[-rows:, :64])
    with pytest.raises(ValueError, match=r"dtype=torch\.float64"):
        pack(parts, torch.float64)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [{}, ODD])
def test_a_compiled_step_is_the_models_step(batch, weights, sizes, tiny_codec_lm, codec_tokens):
    """Logits and every state; bfloat16 weights are exact in the reference, so that one tolerance serves both."""
    model = tiny_codec_lm("gdn_hybrid", **sizes).eval()
    reference = _with_rounded_projections(model) if weights == torch.bfloat16 else model
    tokens = codec_tokens(batch, 4 + STEPS)
    with torch.inference_mode():
        state = reference.prefill(tokens[..., :4], 4 + STEPS)[1]
        step = CompiledStep(model, copy.deepcopy(state), batch, weights)
        for t in range(4, 4 + STEPS):
            expected, state = reference.step(tokens[..., t], state)
            torch.testing.assert_close(step(tokens[..., t]), expected, rtol=0, atol=5e-5)
        with pytest.raises(ValueError, match=f"step {5 + STEPS} exceeds max_steps={4 + STEPS}"):
            step(tokens[..., 0])
    delta, attention = (layer for layer in step.layers[:2])
    wanted, cache = state.layers[:2]
    for ours, theirs in (
        (delta.memory_BHKV, wanted.memory),
        (delta.past_BWC, wanted.conv),
        (attention.keys, _panels(cache.k)),
        (attention.values, _panels(cache.v.transpose(2, 3))),
    ):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=2e-5)
    assert attention.length == cache.length == 4 + STEPS


def _decoded(model: CodecLM, tokens_BKT: torch.Tensor, prefix: int, backend: Backend) -> torch.Tensor:
    """Logits [B, T - prefix + 1, K, V] after each column from the prefix on."""
    with decoding(model, tokens_BKT[..., :prefix], tokens_BKT.shape[-1], backend) as (logits, step):
        columns = range(prefix, tokens_BKT.shape[-1])
        return torch.stack([logits, *(step(tokens_BKT[..., t]).clone() for t in columns)], 1)


@pytest.mark.parametrize("prefix", [1, 12])
def test_compiled_decoding_equals_the_full_forward(codec_architecture, prefix, tiny_codec_lm, codec_tokens):
    x, model = codec_tokens(), tiny_codec_lm(codec_architecture).eval()
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with torch.inference_mode():
        decoded, full = _decoded(model, x, prefix, "numba"), model(x)
    torch.testing.assert_close(decoded, full[:, prefix - 1 :], rtol=0, atol=1e-4)
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])


def test_bfloat16_weights_cost_less_accuracy_than_autocast(codec_architecture, tiny_codec_lm, codec_tokens):
    """Against exact arithmetic on the rounded weights. Where every mixer has a kernel, only the prefix was rounded."""
    x, model = codec_tokens(steps=40), tiny_codec_lm(codec_architecture).eval()
    with torch.inference_mode():
        exact = _with_rounded_projections(model)(x)[:, 3:]
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (_decoded(model, x, 4, backend) - exact for backend in ("numba", "torch"))
    share = float(ours.square().mean() / theirs.square().mean()) ** 0.5
    assert share < (0.8 if set(model.config.mixers) <= {"gated_delta", "attention"} else 1.6), share


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_speech_preset_decodes_in_kernels_alone(weights):
    model = build_lm("speech_olmo_hybrid_a100_20m_ctx1024").eval()
    reference = _with_rounded_projections(model) if weights == torch.bfloat16 else model
    tokens = torch.randint(0, 1024, (3, 8, 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        state = reference.prefill(tokens[..., :3], 6)[1]
        step = CompiledStep(model, copy.deepcopy(state), 3, weights)
        assert len(step.torch_parts) == 0
        for t in range(3, 6):
            expected, state = reference.step(tokens[..., t], state)
            torch.testing.assert_close(step(tokens[..., t]), expected, rtol=0, atol=5e-5)


def test_backends_draw_the_same_samples(tiny_codec_lm):
    """Likeliest tokens differ only where two are within a rounding of each other, drawn ones nearly as rarely."""
    model = tiny_codec_lm("gdn_hybrid", spread=0.3)
    for sampling in (Sampling(temperature=0), Sampling(temperature=0.9, top_k=7, top_p=0.95)):
        ours, theirs = (generate(model, 20, batch=3, sampling=sampling, backend=b, seed=4) for b in ("numba", "torch"))
        assert (ours.backend, theirs.backend) == ("numba", "torch")
        assert torch.equal(ours.codes, theirs.codes)
        torch.testing.assert_close(ours.log_probability, theirs.log_probability, rtol=0, atol=1e-5)


_SAMPLE = """
import torch
from models.codec.names import build_lm
from models.codec.sampling import generate
torch.set_num_threads(1)
made = generate(build_lm("local_olmo_hybrid"), 60, batch=3, backend="numba", seed=5)
print(made.codes.tolist(), [x.hex() for x in made.log_probability.tolist()])
"""


@pytest.mark.slow
def test_a_process_that_compiles_and_one_that_loads_the_kernels_draw_the_same(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parents[3]
    said = [
        subprocess.run(
            [sys.executable, "-c", _SAMPLE], env=environment, cwd=root, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert any(tmp_path.rglob("*.nbc"))
    assert said[0] == said[1] != ""


def test_what_takes_the_steps_is_told_and_an_impossible_wish_is_an_error(tiny_codec_lm):
    model, double = tiny_codec_lm("la"), tiny_codec_lm("la", dtype=torch.float64)
    assert decoding_backend(model) == "numba"
    assert decoding_backend(model, "torch") == "torch"
    assert generate(double, 2).backend == "torch"
    with pytest.raises(ValueError, match=r"backend='numba' needs float32 parameters, but some are torch\.float64"):
        generate(double, 2, backend="numba")
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=r"autocast wants torch\.float16"):
        decoding_backend(model, "numba")
    with pytest.raises(ValueError, match="the model is on meta"):
        decoding_backend(model.to("meta"), "numba")
    with pytest.raises(ValueError, match="backend='cuda' is not one of auto, numba, torch"):
        decoding_backend(model, "cuda")  # type: ignore[arg-type]


def test_a_token_of_probability_zero_is_never_drawn(monkeypatch):
    probability = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [1 / 3, 0.0, 1 / 3, 1 / 3, 0.0]])
    generator = torch.Generator()
    for uniform, expected in ((0.0, [1, 0]), (0.2999999, [1, 0]), (0.34, [3, 2]), (1 - 2**-53, [3, 3])):
        monkeypatch.setattr(torch, "rand", lambda *_, u=uniform, **__: torch.full((2, 1), u, dtype=torch.float64))
        assert draw(probability, generator).tolist() == expected
