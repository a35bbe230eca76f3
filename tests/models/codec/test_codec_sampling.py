"""Sampling: filters, agreement with the full forward, prompts, the delay pattern, best of N, errors."""

from __future__ import annotations

import pytest
import torch

from models.codec.decoding import decoding_weights
from models.codec.delay import training_pair
from models.codec.model import CodecLM
from models.codec.sampling import Sampling, filtered_logits, generate

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))


def _probabilities(**options):
    seen = options.pop("seen", None)
    return filtered_logits(LOGITS, Sampling(**options), seen).softmax(-1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.01]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8, "top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
    ],
)
def test_filters_give_the_distribution_by_hand(options, expected):
    expected = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(_probabilities(**options), expected / expected.sum())


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([2.0, -1.0, 2.0, -1.0])
    seen = torch.tensor([True, True, False, False])
    out = filtered_logits(logits, Sampling(repetition_penalty=2.0), seen)
    assert out.tolist() == [1.0, -2.0, 2.0, -1.0]


def test_greedy_samples_are_the_argmax_of_the_full_forward(codec_architecture, tiny_codec_lm):
    model: CodecLM = tiny_codec_lm(codec_architecture, dtype=torch.float64).eval()
    prompt = torch.randint(0, 13, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    out = generate(model, 13, prompt=prompt, sampling=Sampling(temperature=0)).codes
    assert torch.equal(out[..., :4], prompt)
    with torch.no_grad():
        logits = model(training_pair(out, pad=13, bos=14)[0])[..., :13]
    for k in range(3):
        for t in range(4, 17):
            assert torch.equal(logits[:, t + k, k].argmax(-1), out[:, k, t])


def test_log_probability_is_that_of_the_full_forward(codec_architecture, tiny_codec_lm):
    model: CodecLM = tiny_codec_lm(codec_architecture).eval()
    out = generate(model, 11, batch=3, sampling=Sampling(temperature=1.3, top_k=9, top_p=0.95), seed=2)
    inputs, targets = training_pair(out.codes, pad=13, bos=14)
    for row in range(3):
        nll = model.loss(inputs[row : row + 1], targets[row : row + 1], label_smoothing=0.0).loss.item()
        assert float(out.log_probability[row]) == pytest.approx(-nll, abs=1e-4)


def test_samples_are_codes_and_follow_the_seed(tiny_codec_lm):
    model = tiny_codec_lm("gdn_hybrid")
    one, same, other = (generate(model, 20, batch=4, seed=s).codes for s in (0, 0, 1))
    assert one.shape == (4, 3, 20)
    assert int(one.max()) < 13
    assert int(one.min()) >= 0
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len({tuple(row.flatten().tolist()) for row in one}) == 4


def test_a_sample_does_not_depend_on_its_neighbours(tiny_codec_lm):
    model = tiny_codec_lm("mc_mamba", dtype=torch.float64)
    prompts = torch.randint(0, 13, (3, 3, 5), generator=torch.Generator().manual_seed(7))
    greedy = Sampling(temperature=0, repetition_penalty=1.5)
    together = generate(model, 9, prompt=prompts, sampling=greedy).codes
    for row in range(3):
        assert torch.equal(generate(model, 9, prompt=prompts[row : row + 1], sampling=greedy).codes[0], together[row])


def test_sampled_frequencies_follow_the_model(tiny_codec_lm):
    model = tiny_codec_lm("la", spread=0.3)
    n = 4000
    first = generate(model, 1, batch=n, seed=3).codes[:, 0, 0]
    with torch.no_grad():
        expected = model(torch.full((1, 3, 1), 14))[0, 0, 0, :13].softmax(-1)
    observed = torch.bincount(first, minlength=13) / n
    # five standard errors of a binomial share
    assert ((observed - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1e-9).all()


def test_repetition_penalty_makes_samples_less_repetitive(tiny_codec_lm):
    model = tiny_codec_lm("gdn_hybrid", spread=0.3)

    def distinct(penalty):
        codes = generate(model, 13, sampling=Sampling(temperature=0, repetition_penalty=penalty)).codes
        return sum(len(set(codes[0, k].tolist())) for k in range(3))

    assert distinct(1.0) < distinct(1e6)


def test_best_of_n_keeps_the_likeliest_of_the_same_draws(tiny_codec_lm):
    model = tiny_codec_lm("mamba2")
    prompt = torch.randint(0, 13, (2, 3, 2), generator=torch.Generator().manual_seed(0))
    every = generate(model, 6, prompt=prompt.repeat_interleave(5, 0), seed=9)
    best = generate(model, 6, prompt=prompt, sampling=Sampling(best_of=5), seed=9)
    scores = every.log_probability.view(2, 5)
    assert torch.equal(best.log_probability, scores.max(1).values)
    assert torch.equal(best.codes, every.codes.view(2, 5, 3, 8)[torch.arange(2), scores.argmax(1)])


def test_special_tokens_are_never_drawn(tiny_codec_lm):
    model = tiny_codec_lm("la")
    with torch.no_grad():
        model.heads[:, 13:] = 50 * model.heads[:, 6:7]  # far likelier than any code where code 6 is likely
    assert int(generate(model, 30, batch=40, seed=1).codes.max()) == 12


def test_bad_requests_are_named(tiny_codec_lm):
    model = tiny_codec_lm("la")
    with pytest.raises(ValueError, match="prompt of 70 frames plus 1 new ones exceed the context of 64 steps"):
        generate(model, 1, prompt=torch.zeros(1, 3, 70, dtype=torch.long))
    with pytest.raises(ValueError, match="holds 62 frames"):
        generate(model, 63)
    assert generate(model, 62).codes.shape == (1, 3, 62)
    with pytest.raises(ValueError, match="token 13 is outside the vocabulary of 13"):
        generate(model, 1, prompt=torch.full((1, 3, 2), 13))
    with pytest.raises(ValueError, match="K=3 codebooks"):
        generate(model, 1, prompt=torch.zeros(1, 4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="n_frames=0"):
        generate(model, 0)
    for options, message in (
        ({"temperature": -1}, "temperature=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**options)


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_are_laid_out_for_a_sample_and_put_back(codec_architecture, tiny_codec_lm, bf16):
    model: CodecLM = tiny_codec_lm(codec_architecture).eval()
    before = {name: (p.data_ptr(), p.stride(), p.detach().clone()) for name, p in model.named_parameters()}
    seen = []

    def look_and_fail() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), decoding_weights(model):
            seen.append(model.heads.detach())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        look_and_fail()
    assert seen[0].stride(-1) != 1
    assert torch.equal(seen[0], before["heads"][2].to(torch.bfloat16 if bf16 else torch.float32))
    for name, p in model.named_parameters():
        pointer, stride, values = before[name]
        assert (p.data_ptr(), p.stride()) == (pointer, stride)
        assert torch.equal(p, values)
