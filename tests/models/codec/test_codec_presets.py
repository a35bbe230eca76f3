"""Presets: pinned parameter counts, matched baselines, declared operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.codec.cost import lm_cost, match_parameters, names_by_group
from models.codec.model import build_codec_lm
from models.codec.names import CODEC_LMS, build_lm, lm_config
from models.codec.presets import MC_LA_48M, SCALES, SPEECH, scale_config


@pytest.mark.parametrize(
    ("preset", "parameters", "attention"),
    [
        ("speech_olmo_hybrid_a100_20m_ctx1024", 21_904_648, [4, 8]),
        ("music_olmo_hybrid_300m_a100", 294_263_072, [4, 8, 12, 16, 20]),
        ("music_gdn_hybrid_300m_a100", 326_407_936, [4, 8, 12, 16, 20, 22]),
    ],
)
def test_published_parameter_counts(preset, parameters, attention):
    model = build_lm(preset, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())
    assert [i for i, m in enumerate(model.config.mixers, 1) if m == "attention"] == attention


@pytest.mark.parametrize(
    ("preset", "parameters", "overhead", "cached_layers"),
    [("mc_la_48m", 48.6e6, 0.025, range(1, 13)), ("mc_la_95m", 95.1e6, 0.031, range(10, 15))],
)
def test_memory_caching_sizes_and_overheads(preset, parameters, overhead, cached_layers):
    config = lm_config(preset)
    cost = lm_cost(config)
    assert cost.parameters == pytest.approx(parameters, rel=0.005)
    assert cost.memory_cache / cost.parameters == pytest.approx(overhead, rel=0.005)
    without = lm_cost(replace(config, memory_cache=None))
    assert cost.parameters - without.parameters == cost.memory_cache
    names = [n for n, _ in build_lm(preset, device="meta").named_parameters() if ".gate.bias" in n]
    assert [int(n.split(".")[1]) + 1 for n in names] == list(cached_layers)


@pytest.mark.parametrize("preset", CODEC_LMS)
def test_every_architecture_of_a_scale_matches_its_reference_within_one_percent(preset):
    scale, architecture = CODEC_LMS[preset]
    if architecture in SCALES[scale].fixed:
        pytest.skip("its count is a contract of its own")
    config, reference = lm_config(preset), SCALES[scale].reference
    assert lm_cost(config).parameters == pytest.approx(lm_cost(reference).parameters, rel=0.01)
    assert (
        replace(
            config,
            d_ff=reference.d_ff,
            mixer=reference.mixer,
            attention_every=reference.attention_every,
            force_final_attention=reference.force_final_attention,
            memory_cache=reference.memory_cache,
            n_kv_heads=reference.n_kv_heads,
        )
        == reference
    ), "more than the mixer and d_ff differs"


def test_the_solver_refuses_what_no_width_reaches():
    with pytest.raises(ValueError, match=r"d_ff=8, closest to 1,000,000"):
        match_parameters(SPEECH, 1_000_000)


def test_declared_operations_equal_the_counted_ones_for_attention():
    """PyTorch counts the full T x T score matrix; half of it, with the diagonal, is visible."""
    config = replace(lm_config("local_transformer"), context=40)
    model = build_codec_lm(config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 8, 40, dtype=torch.long))
    full = counter.get_total_flops() / 40
    d, layers = config.d_model, config.n_layers
    assert lm_cost(config).flops_per_token == pytest.approx(full - layers * 4 * d * (40 - 41 / 2), rel=1e-12)


@pytest.mark.parametrize("architecture", ["olmo_hybrid", "gdn", "la", "mc_la", "mamba", "mamba2"])
def test_declared_operations_cover_the_counted_products_of_the_recurrent_form(architecture):
    """The recurrence's own products are a lower bound; element-wise work adds less than a tenth here."""
    config = replace(scale_config("local", architecture), context=130, impl="recurrent")
    model = build_codec_lm(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 8, 130, dtype=torch.long))
    counted = counter.get_total_flops() / 130
    declared = lm_cost(config).flops_per_token
    assert declared == pytest.approx(counted, rel=0.1)


def test_operations_of_recurrent_models_do_not_grow_with_context_and_those_of_attention_do():
    def growth(architecture):
        config = scale_config("speech", architecture)
        return lm_cost(config, 1024).flops_per_token - lm_cost(config, 512).flops_per_token

    assert growth("mamba") == growth("gdn") == growth("la") == 0
    assert growth("transformer") == 8 * 4 * 384 * 256
    assert 0 < growth("mc_la") < growth("transformer")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["olmo_hybrid", "mc_la", "mc_mamba", "hybrid_1_7", "mamba2"])
def test_decoding_equals_the_full_forward_at_full_size(architecture):
    model = build_lm(f"speech_{architecture}_a100_20m_ctx1024").eval()
    steps = 150  # past the first boundary of the 128-token segments
    x = torch.randint(0, 1024, (1, 8, steps), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(x)
    logits, state = model.prefill(x[..., :20], steps)
    decoded = [logits]
    for t in range(20, steps):
        logits, state = model.step(x[..., t], state)
        decoded.append(logits)
    torch.testing.assert_close(torch.stack(decoded, 1), full[:, 19:], rtol=0, atol=1e-4)


def test_groups_name_every_parameter_once():
    model = build_lm("local_mc_mamba", device="meta")
    groups = dict(names_by_group(model))
    assert list(groups) == [name for name, _ in model.named_parameters()]
    assert set(groups.values()) == {"embedding", "heads", "norm", "mlp", "memory_cache", "mixer.Mamba"}
    hybrid = set(dict(names_by_group(build_lm("local_olmo_hybrid", device="meta"))).values())
    assert {"mixer.Attention", "mixer.GatedDeltaNet"} <= hybrid


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"preset='speech' is not one of speech_olmo_hybrid_a100_20m_ctx1024"):
        build_lm("speech")
    with pytest.raises(ValueError, match="scale='huge'"):
        scale_config("huge", "gdn")
    with pytest.raises(ValueError, match="architecture='rnn'"):
        scale_config("local", "rnn")
    with pytest.raises(ValueError, match="hybrid_1_7 has attention every 8 layers"):
        scale_config("local", "hybrid_1_7")


def test_published_options_of_memory_caching():
    cache = MC_LA_48M.memory_cache
    assert cache is not None
    assert torch.tensor(cache.gate_bias_init).sigmoid() == pytest.approx(0.12, abs=0.001)
    assert (cache.segment, cache.normalized_retrieval, cache.cumulative) == (256, False, True)
