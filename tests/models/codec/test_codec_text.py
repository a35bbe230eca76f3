"""Text conditioning: causality, decoding = full forward, padding, dropped texts, learning from the text, bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models.codec.cost import lm_cost, names_by_group
from models.codec.model import CodecLM, build_codec_lm, config_facts, config_of
from models.codec.names import lm_config
from models.codec.presets import LOCAL, SCALES, scale_config, text_config
from models.codec.sampling import Sampling, generate
from models.codec.text import PAD, TextConfig, Texts, encode_texts, text_bytes

TEXT = TextConfig(width=16, n_layers=2, n_heads=2, d_ff=24, max_bytes=40, blocks=(1, 3))
SAID = ("a cat", "two dogs ran off")
NAMES = ("attention", "gdn_hybrid", "mamba", "mc_la")


def said(*texts: str) -> Texts:
    return encode_texts(texts, TEXT.max_bytes)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_to_a_later_step_and_each_step_sees_the_whole_text(name, tiny_codec_lm, codec_tokens):
    model = tiny_codec_lm(name, text=TEXT)
    x = model.embed(codec_tokens()).detach().requires_grad_()
    seen = []
    model.text_encoder.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    hidden = model.decode_embedded(x, said(*SAID))
    for t in (0, 9, 22):
        by_step, by_byte = torch.autograd.grad(hidden[:, t].square().sum(), (x, seen[0]), retain_graph=True)
        assert torch.count_nonzero(by_step[:, t + 1 :]) == 0
        sizes = by_byte.abs().amax(-1)
        assert (sizes[1] > 0).all()
        assert (sizes[0, : 1 + len(SAID[0])] > 0).all()
        assert torch.count_nonzero(sizes[0, 1 + len(SAID[0]) :]) == 0, "padding is read"


@pytest.mark.parametrize("name", NAMES)
def test_decoding_step_by_step_equals_the_full_forward(name, tiny_codec_lm, codec_tokens):
    x = codec_tokens()
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        model = tiny_codec_lm(name, dtype=dtype, text=TEXT).eval()
        with torch.no_grad():
            full = model(x, said(*SAID))
        logits, state = model.prefill(x[..., :5], x.shape[-1], said(*SAID))
        decoded = [logits]
        for t in range(5, x.shape[-1]):
            logits, state = model.step(x[..., t], state)
            decoded.append(logits)
        torch.testing.assert_close(torch.stack(decoded, 1), full[:, 4:], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["gdn_hybrid", "mamba"])
def test_compiled_steps_draw_what_the_models_own_do(name, tiny_codec_lm):
    model = tiny_codec_lm(name, text=TEXT).eval()
    options = {"batch": 2, "sampling": Sampling(temperature=0, best_of=2), "texts": said(*SAID)}
    drawn = {b: generate(model, 12, backend=b, **options) for b in ("numba", "torch")}
    assert torch.equal(drawn["numba"].codes, drawn["torch"].codes)
    torch.testing.assert_close(drawn["numba"].log_probability, drawn["torch"].log_probability, rtol=0, atol=1e-4)
    swapped = generate(model, 12, **options | {"texts": said(*reversed(SAID))})
    assert torch.equal(swapped.codes.flip(0), drawn["numba"].codes)
    assert not torch.equal(swapped.codes, drawn["numba"].codes)


def test_a_text_beside_a_longer_one_is_read_as_alone_and_a_byte_matters(tiny_codec_lm, codec_tokens):
    model = tiny_codec_lm("gdn_hybrid", dtype=torch.float64, text=TEXT).eval()
    x = codec_tokens()
    with torch.no_grad():
        both = model(x, said(*SAID))
        alone = torch.cat([model(x[i : i + 1], said(SAID[i])) for i in range(2)])
        other = model(x, said("a cut", SAID[1]))
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-12)
    moved = (other - both).abs().amax((1, 2, 3))
    assert moved[0] > 1e-6
    assert moved[1] == 0


def test_no_text_an_empty_one_and_a_dropped_one_are_the_same(tiny_codec_lm, codec_tokens):
    model = tiny_codec_lm("attention", text=TEXT).eval()
    x = codec_tokens()
    with torch.no_grad():
        none, empty, beside = model(x), model(x, said("", "")), model(x, said("", SAID[1]))
    assert torch.equal(none, empty)
    torch.testing.assert_close(beside[0], none[0], rtol=0, atol=1e-5)
    assert (beside[1] - none[1]).abs().amax() > 1e-3


def test_every_parameter_receives_a_gradient_and_has_a_group(tiny_codec_lm, codec_tokens):
    model = tiny_codec_lm("gdn_hybrid", text=TEXT)
    x = codec_tokens()
    model.loss(x[..., :-1], x[..., 1:], said(*SAID)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    groups = dict(names_by_group(model))
    assert {g for n, g in groups.items() if n.startswith("text_encoder.")} == {"text_encoder"}
    assert {n.split(".")[1] for n, g in groups.items() if g == "cross_attention"} == {"0", "2"}
    assert "text_encoder" not in dict(names_by_group(tiny_codec_lm("gdn_hybrid"))).values()


def learned(model: CodecLM, texts: Texts | None) -> float:
    """Nats a token after learning four clips whose tokens are a function of their text alone."""
    codes = torch.stack([torch.full((3, 6), i) for i in (2, 5, 7, 11)])
    inputs = torch.full_like(codes, model.config.bos)  # nothing but the text tells the clips apart
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(40):
        optimizer.zero_grad()
        result = model.loss(inputs, codes, texts, label_smoothing=0.0)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(result.loss.detach())


def test_tokens_that_follow_from_the_text_are_learned_with_it_and_not_without(tiny_config):
    config = tiny_config("attention", n_layers=1, text=replace(TEXT, n_layers=1, blocks=(1,)))
    texts = said("no", "on", "one two", "two one")  # two pairs of the same bytes: order must be read
    assert learned(build_codec_lm(config, seed=0), texts) < 0.05
    assert learned(build_codec_lm(config, seed=0), None) > math.log(4) - 0.05


@pytest.mark.parametrize("scale", [name for name, s in SCALES.items() if s.text is not None])
@pytest.mark.parametrize("architecture", ["olmo_hybrid", "transformer", "mamba", "mc_la"])
def test_a_model_with_text_matches_the_same_reference_within_one_percent(scale, architecture):
    config, plain = scale_config(scale, architecture, text=True), scale_config(scale, architecture)
    cost = lm_cost(config)
    assert cost.parameters == pytest.approx(lm_cost(SCALES[scale].reference).parameters, rel=0.01)
    assert replace(config, text=None, d_ff=plain.d_ff) == plain, "more than the text and d_ff differs"
    assert cost.text == cost.parameters - lm_cost(replace(config, text=None)).parameters > 0


def test_operations_count_the_encoder_once_a_text_and_cross_attention_once_a_step():
    config = scale_config("local", "transformer", text=True)
    text = config.text
    S, D, W = text.max_bytes + 1, config.d_model, text.width
    layer = 2 * (4 * W * W + 3 * W * text.d_ff) + 4 * S * W
    keys, step = 2 * 2 * W * D, 4 * D * D + 4 * S * D
    expected = S * (text.n_layers * layer + 2 * keys) / 100 + 2 * step
    plain = lm_cost(replace(config, text=None), 100).flops_per_token
    assert lm_cost(config, 100).flops_per_token - plain == pytest.approx(expected)


def test_without_text_the_stored_configuration_is_what_it_was():
    facts = config_facts(LOCAL)
    assert list(facts)[-3:] == ["rope_base", "norm_eps", "impl"]
    for config in (LOCAL, lm_config("local_mc_la"), scale_config("local", "mc_la", text=True)):
        assert config_of(config_facts(config)) == config
    assert not any("text" in n or "cross" in n for n in build_codec_lm(LOCAL, device="meta").state_dict())


def test_initial_weights_of_the_text_follow_the_rules():
    model = build_codec_lm(scale_config("local", "la", text=True), seed=3)
    assert float(model.text_encoder.embedding.detach().std()) == pytest.approx(1, rel=0.05)
    d, layers = model.config.d_model, model.config.n_layers
    bound = math.sqrt(6 / (2 * d)) / math.sqrt(2 * layers)
    assert 0.95 * bound < model.blocks[1].cross.out.weight.abs().max() <= bound
    own = math.sqrt(6 / (2 * model.config.text.width)) / math.sqrt(2 * model.config.text.n_layers)
    assert 0.9 * own < model.text_encoder.blocks[0].attention.out.weight.abs().max() <= own


def test_texts_are_bytes_of_one_normal_form():
    assert text_bytes("cafe\u0301") == text_bytes("caf\u00e9") == b"caf\xc3\xa9"
    texts = encode_texts(["Ab", ""], 2)
    assert texts.ids_BS.tolist() == [[256, 65, 98], [256, PAD, PAD]]
    assert texts.length_B.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (1, 4)}, r"text blocks=\(1, 4\) must lie in 1..n_layers=3"),
        ({"blocks": (0, 1)}, r"text blocks=\(0, 1\) must lie in 1..n_layers=3"),
        ({"blocks": ()}, r"text blocks=\(\) must name one block or more"),
        ({"blocks": (2, 1)}, "rising"),
        ({"max_bytes": 0}, "text max_bytes=0; choose max_bytes >= 1"),
        ({"n_heads": 3}, "text width=16 does not split into 3 heads of even width"),
    ],
)
def test_impossible_configurations_are_named(changes, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        tiny_config("attention", text=replace(TEXT, **changes))


def test_bad_inputs_are_named(tiny_codec_lm, codec_tokens):
    model, x = tiny_codec_lm("attention", text=TEXT), codec_tokens()
    with pytest.raises(ValueError, match=r"a text of 41 bytes \(UTF-8\) exceeds max_bytes=40 of the model"):
        said("é" * 20 + "x")
    with pytest.raises(ValueError, match="texts of 60 bytes exceed max_bytes=40"):
        model(x, encode_texts(["a" * 60, "b"], 60))
    with pytest.raises(ValueError, match="1 texts were given for 2 clips"):
        model(x, said("one"))
    with pytest.raises(ValueError, match="no texts were given"):
        said()
    with pytest.raises(ValueError, match="model without a text encoder"):
        tiny_codec_lm("attention")(x, said(*SAID))
    with pytest.raises(ValueError, match="scale='music' has no text conditioning; choose one of speech, local"):
        text_config("music")
