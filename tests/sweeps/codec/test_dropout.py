"""Dropout in training: off by default to the bit, and a function of seed, step and clip where it is on."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from models.codec.model import build_codec_lm, config_facts, config_of
from models.codec.presets import LOCAL
from models.mixers.base import ResidualDropout
from sweeps.codec.loop import Batch, TrainConfig, Trainer
from sweeps.codec.presets import PRESETS
from sweeps.codec.sweep import SWEEP
from sweeps.core.cells import UserError
from sweeps.core.world import World

CONFIG = replace(LOCAL, d_model=16, n_layers=2, n_heads=2, d_ff=16, n_codebooks=2, codebook_size=11, context=32,
                 mixer="attention")  # fmt: skip
DROPPED = replace(CONFIG, dropout=0.3)
MUSIC_WITHOUT = "3c7358d702568a07"  # of the first cell of music_a100 as it was before there was dropout


def batch(seed: int, clips: int = 5) -> Batch:
    drawn = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randint(0, CONFIG.codebook_size, (clips, 2, 9), generator=drawn) for _ in range(2))
    targets[0, :, 6:] = CONFIG.pad
    return Batch(inputs, targets, int((targets != CONFIG.pad).sum()))


def trainer(seed: int = 0, micro_batch: int = 0) -> Trainer:
    config = TrainConfig(steps=20, lr=1e-2, lr_end=1e-3, warmup_steps=2, micro_batch=micro_batch)
    return Trainer(build_codec_lm(DROPPED, seed=1), config, seed=seed)


def weights(t: Trainer) -> list[torch.Tensor]:
    return [p.detach() for p in (*t.model.parameters(), *t.ema.parameters())]


def test_without_dropout_nothing_changes() -> None:
    model, tokens = build_codec_lm(CONFIG, seed=1).train(), batch(0).inputs_BKT
    before = torch.get_rng_state()
    x = model.embed(tokens)
    for block in model.blocks:
        x = x + block.mixer(block.mixer_norm(x))
        x = x + block.mlp(block.mlp_norm(x))
    assert torch.equal(model(tokens), model.logits(model.norm(x)))
    assert torch.equal(torch.get_rng_state(), before)
    assert "dropout" not in config_facts(CONFIG)
    assert config_of(config_facts(CONFIG)) == CONFIG
    assert config_of(config_facts(DROPPED)) == DROPPED
    assert model.state_dict().keys() == build_codec_lm(DROPPED).state_dict().keys()


def test_keys_change_for_cells_with_dropout_alone() -> None:
    music = PRESETS["music_a100"]
    assert music.dropout == 0.1
    with_it, without = (SWEEP.plan(replace(music, dropout=p))[0] for p in (0.1, 0.0))
    assert without.key == MUSIC_WITHOUT
    assert with_it.key != MUSIC_WITHOUT
    assert with_it.identity()["dropout"] == 0.1
    assert (with_it.lm_config().dropout, without.lm_config().dropout) == (0.1, 0.0)
    assert all("dropout" not in SWEEP.plan(PRESETS[p])[0].identity() for p in ("local", "speech_a100", "text_local"))
    text = SWEEP.plan(replace(PRESETS["text_local"], dropout=0.2))[0]
    assert text.lm_config().dropout == 0.2
    with pytest.raises(UserError, match=r"dropout=1\.0 must lie in 0\.\.1"):
        SWEEP.plan(replace(music, dropout=1.0))


def test_a_share_p_is_dropped_and_the_rest_raised() -> None:
    drop = ResidualDropout(0.25)
    drop.streams = [torch.Generator().manual_seed(s) for s in (3, 4)]
    y = drop(torch.ones(2, 50, 40))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(y[0], y[1])
    with pytest.raises(ValueError, match="2 random streams for 3 clips"):
        drop(torch.ones(3, 5, 4))
    assert torch.equal(drop.eval()(torch.ones(3, 5, 4)), torch.ones(3, 5, 4))


def test_evaluation_drops_nothing() -> None:
    plain, dropped = (build_codec_lm(c, seed=1).eval() for c in (CONFIG, DROPPED))
    tokens = batch(0).inputs_BKT
    assert torch.equal(plain(tokens), dropped(tokens))
    assert not torch.equal(plain(tokens), dropped.train()(tokens))
    assert torch.equal(plain.prefill(tokens, 20)[0], dropped.prefill(tokens, 20)[0])  # whatever its mode


def test_a_killed_run_continues_to_the_same_bits() -> None:
    whole = trainer()
    for step in range(6):
        whole.step(batch(step))
    half = trainer()
    for step in range(3):
        half.step(batch(step))
    sink = io.BytesIO()
    torch.save(half.state(), sink)
    torch.manual_seed(99)
    rest = trainer()
    rest.restore(torch.load(io.BytesIO(sink.getvalue()), weights_only=True))
    for step in range(3, 6):
        rest.step(batch(step))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(rest), strict=True))
    other = trainer(seed=1)
    other.step(batch(0))
    again = trainer()
    again.step(batch(0))
    assert not torch.equal(weights(other)[0], weights(again)[0])


def test_masks_do_not_depend_on_micro_batches_or_processes() -> None:
    def gradients(micro_batch: int, size: int) -> tuple[float, list[torch.Tensor]]:
        loss, sums = 0.0, None
        for rank in range(size):
            t = trainer(micro_batch=micro_batch)
            t.world = World(rank, size)
            loss += t._accumulate(batch(0))
            found = [p.grad / size for p in t.model.parameters()]
            sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
        return loss, sums or []

    loss, expected = gradients(0, 1)
    for micro_batch, size in ((1, 1), (3, 1), (0, 2), (2, 2)):
        other, found = gradients(micro_batch, size)
        assert other == pytest.approx(loss, rel=1e-6)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
