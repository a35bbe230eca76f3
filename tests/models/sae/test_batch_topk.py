"""BatchTopK and Matryoshka: gradients against autograd and SAELens, the exact top of a batch, resume, export."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from models.sae.engines import PARAMETERS
from models.sae.model import SAEConfig, TopKSAE, matryoshka_widths
from models.sae.saelens import save_saelens
from models.sae.trainer import JumpReLUSAE, SAEBank, SparseTrainer
from tests.models.sae.test_topk_training import activations, assert_same_state, config_of, relative_error

KINDS = ["batchtopk", "matryoshka"]
SPARSE = ["torch", "numba"]


def config(kind: str, **changes: object) -> SAEConfig:
    d_sae = int(changes.get("d_sae", 512))  # type: ignore[call-overload]
    widths = matryoshka_widths(d_sae) if kind == "matryoshka" else ()
    return config_of(**{"kind": kind, "matryoshka_widths": widths, **changes})


def uneven(rows: int, width: int, seed: int) -> torch.Tensor:
    """Activations of which a few tokens are much longer: they keep many features, others hardly any."""
    x = activations(rows, width, seed)
    x[::29] *= 12.0
    return x


def trained(config: SAEConfig, backend: str, steps: int = 4) -> SparseTrainer:
    trainer = SparseTrainer(config, backend=backend, n_threads=1)  # type: ignore[arg-type]
    for step in range(steps):
        trainer.step(uneven(250, config.d_in, step))
    return trainer


def reference(
    sae: TopKSAE, config: SAEConfig, x: torch.Tensor, dead: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], float, torch.Tensor]:
    """Gradients, loss and activations by float64 autograd, from the equations alone."""
    leaves = {name: getattr(sae, name).detach().double().requires_grad_() for name in PARAMETERS}
    W_enc, W_dec, b_enc, b_dec = leaves.values()
    x = x.double()
    norm = W_dec.norm(dim=-1) if config.rescale_acts_by_decoder_norm else torch.ones_like(b_enc)
    scores = ((x - b_dec if config.apply_b_dec_to_input else x) @ W_enc.T + b_enc) * norm
    flat = scores.relu().flatten()
    best = flat.topk(config.k * len(x))
    h = torch.zeros_like(flat).scatter(0, best.indices, best.values).view_as(scores)
    loss = sum(((h[:, :w] / norm[:w]) @ W_dec[:w] + b_dec - x).pow(2).sum(-1).mean() for w in config.widths)
    if dead is not None:
        n_dead = int(dead.sum())
        top = scores.masked_fill(~dead, -torch.inf).topk(min(config.n_aux, n_dead), dim=-1)
        a = torch.zeros_like(scores).scatter(-1, top.indices, top.values)
        missed = (x - (h / norm) @ W_dec - b_dec).detach()
        scale = config.aux_coefficient * min(n_dead / config.n_aux, 1.0)
        loss = loss + scale * ((a / norm) @ W_dec - missed).pow(2).sum(-1).mean()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(PARAMETERS, grads, strict=True)), loss.item(), h.detach()


VARIANTS: dict[str, dict] = {
    "plain": {},
    "few dead": {"dead_after_steps": 0, "aux_k": 5},
    "norms out": {"rescale_acts_by_decoder_norm": False},
    "b_dec out": {"apply_b_dec_to_input": False},
    "odd sizes": {"d_in": 29, "d_sae": 331, "k": 7},
    "several blocks, many dead": {"d_in": 70, "d_sae": 900, "k": 5, "dead_after_steps": 0, "aux_k": 9},
    "more wanted than positive": {"d_sae": 64, "k": 61},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["dense", "torch", "numba, int8", "numba, float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_autograd(
    kind: str, backend: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, _, product = backend.partition(", ")
    monkeypatch.setattr("models.sae.screen.screen_precision", lambda: getattr(torch, product or "float32"))
    own = config(kind, **VARIANTS[variant])
    trainer = trained(own, backend, steps=3)
    x = uneven(200, own.d_in, 77)
    dead = trainer.dead if trainer.dead.any() else None
    assert (dead is not None) == ("dead" in variant)
    wanted, loss, h = reference(trainer.sae, own, x, dead)
    losses = trainer._engine.gradients(x, None if dead is None else dead.nonzero().flatten())
    assert losses.mse + losses.inner + losses.aux == pytest.approx(loss, rel=1e-5)
    assert (losses.inner > 0) == (kind == "matryoshka")
    for name in PARAMETERS:
        assert relative_error(trainer._engine.gradient(name), wanted[name]) < 1e-5, name
    total = torch.cat([grad.flatten() for grad in wanted.values()]).norm().item()
    assert trainer._engine.grad_norm() == pytest.approx(total, rel=1e-5)
    assert torch.equal(losses.fired_M, (h > 0).any(0))
    assert losses.active == int((h > 0).sum())
    assert losses.least == pytest.approx(h[h > 0].min().item(), rel=1e-5, abs=1e-6)
    per_token = (h > 0).sum(-1)
    assert per_token.max() > 3 * per_token.float().mean() or variant == "more wanted than positive"


def peer_of(own: SAEConfig):
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    sizes = {"d_in": own.d_in, "d_sae": own.d_sae, "k": own.k}
    torch.manual_seed(own.seed)
    if own.kind == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes))
    widths = list(own.matryoshka_widths)
    return MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**sizes, matryoshka_widths=widths))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", SPARSE)
def test_gradients_are_those_of_saelens(kind: str, backend: str) -> None:
    """Their own forward pass and backward at the weights of a trained SAE of ours, dead features included."""
    from sae_lens.saes.sae import TrainStepInput

    own = config(kind, dead_after_steps=0)
    trainer = trained(own, backend)
    theirs = peer_of(own)
    with torch.no_grad():
        for name in PARAMETERS:
            weight = getattr(trainer.sae, name)
            getattr(theirs, name).copy_(weight.T if name == "W_enc" else weight)
    x = uneven(200, own.d_in, 77)
    assert trainer.dead.any()
    output = theirs.training_forward_pass(TrainStepInput(x, {}, trainer.dead, 0, False))
    output.loss.backward()
    losses = trainer._engine.gradients(x, trainer.dead.nonzero().flatten())
    assert losses.mse + losses.inner + losses.aux == pytest.approx(output.loss.item(), rel=1e-5)
    for name in PARAMETERS:
        wanted = getattr(theirs, name).grad
        wanted = wanted.T if name == "W_enc" else wanted
        assert relative_error(trainer._engine.gradient(name), wanted.double()) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["dense", *SPARSE])
def test_training_and_export_are_those_of_saelens(kind: str, backend: str, tmp_path: Path) -> None:
    """Twelve steps of SAELens' own trainer against ours, then both inference models: losses, threshold, files."""
    from sae_lens import SAE
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps, rows = 12, 128
    own = config(kind, warmup_steps=4, dead_after_steps=2)
    theirs = peer_of(own)
    batches = [activations(rows, own.d_in, step) for step in range(steps)]
    settings = SAETrainerConfig(
        total_training_samples=rows * steps,
        train_batch_size_samples=rows,
        lr=own.lr,
        lr_end=own.lr / 10,
        lr_warm_up_steps=own.warmup_steps,
        dead_feature_window=own.dead_after_steps,
    )
    peer = SAETrainer(settings, theirs, iter(batches))
    trainer = SparseTrainer(own, backend=backend, n_threads=1)  # type: ignore[arg-type]
    for batch in batches:
        output = peer.step(batch)
        peer.n_training_steps += 1
        stats = trainer.step(batch)
        assert stats.loss == pytest.approx(output.loss.item(), rel=1e-4)
        assert stats.mse == pytest.approx(output.losses["mse_loss"].item(), rel=1e-4)
        assert torch.equal(trainer.dead, peer.dead_neurons)
    assert trainer.threshold == pytest.approx(theirs.topk_threshold.item(), rel=1e-4)
    theirs.save_inference_model(tmp_path / "theirs")
    save_saelens(trainer.inference(), tmp_path / "ours", {"training_architecture": theirs.cfg.architecture()})
    wanted, found = SAE.load_from_disk(tmp_path / "theirs"), SAE.load_from_disk(tmp_path / "ours")
    assert type(found) is type(wanted)
    assert found.cfg.metadata["training_architecture"] == wanted.cfg.metadata["training_architecture"]
    x = activations(300, own.d_in, 99)
    with torch.no_grad():
        mine = trainer.inference()(x)
        torch.testing.assert_close(found(x), mine, rtol=1e-5, atol=1e-5)
        # weights differ by what Adam makes of rounding, and a feature at the threshold may fire in one alone
        assert ((wanted(x) - mine).norm(dim=-1) / mine.norm(dim=-1)).median() < 1e-3
    assert mine.shape == x.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", SPARSE)
def test_resumed_is_uninterrupted_and_packed_is_alone(kind: str, backend: str) -> None:
    """Bit for bit; the bank holds cells of other kinds and widths."""
    own = config(kind)
    whole = trained(own, backend, steps=6)
    half = trained(own, backend, steps=3)
    twin = SparseTrainer(own, backend="dense", n_threads=1)
    twin.load_state_dict({k: v.clone() if torch.is_tensor(v) else v for k, v in half.state_dict().items()})
    cells = {"mine": (1, own), "topk": (1, config_of(k=4)), "other": (1, config(KINDS[0], d_sae=700, k=24, seed=3))}
    bank = SAEBank(cells, backend=backend, n_threads=1)  # type: ignore[arg-type]
    for step in range(6):
        batch = uneven(250, own.d_in, step)
        bank.step({1: batch})
        if step >= 3:
            twin.step(batch)
    assert whole.threshold > 0
    assert_same_state(whole, twin)
    assert_same_state(whole, bank.trainers["mine"])


@pytest.mark.usefixtures("int8")
def test_threads_and_guesses_change_no_bit() -> None:
    """The guess of the edge, the precision of the screen and the threads decide the time alone."""
    own = config("matryoshka", d_in=70)
    trainers = [SparseTrainer(own, backend="numba", n_threads=n) for n in (1, 2, 1, 1, 1)]
    for step in range(4):
        batch = uneven(250, 70, step)
        guesses = [math.nan, math.nan, 0.0, 1e9, 1e-3]
        for trainer, guess in zip(trainers, guesses, strict=True):
            batches = trainer._engine._batch  # type: ignore[attr-defined]
            if step:
                batches.guess = batches.guess if math.isnan(guess) else guess
            trainer.step(batch)
            assert not step or guess != 1e-3 or batches.doubtful == 1.0
    states = [trainer.state_dict() for trainer in trainers]
    for state in states[1:]:
        # a batch that the low precision could not settle turns the screen to bfloat16, which is state, not result
        same = {k for k, v in state.items() if torch.is_tensor(v) and not torch.equal(v, states[0][k])}
        assert same <= {"derived.hold", "derived.guess"}


@pytest.mark.usefixtures("int8")
@pytest.mark.parametrize("kind", KINDS)
def test_the_top_of_a_batch_is_exact_where_the_screen_is_blind(kind: str) -> None:
    """A component common to all tokens and features drowns the ranking in low precision."""
    own = config(kind, d_in=64, d_sae=1024, k=16)
    trainer = SparseTrainer(own, backend="numba", n_threads=1)
    trainer.sae.W_enc[:, 0] = 0.05
    trainer._engine.refresh()
    x = activations(128, 64, 5)
    x[:, 0] = 3000.0
    wanted, _, _ = reference(trainer.sae, own, x, None)
    losses = trainer._engine.gradients(x, None)
    assert losses.rescreened == 128
    for name in PARAMETERS:
        assert relative_error(trainer._engine.gradient(name), wanted[name]) < 1e-5, name


@pytest.mark.usefixtures("int8")
def test_an_easy_batch_is_settled_by_the_screen() -> None:
    trainer = SparseTrainer(config("batchtopk", d_in=64, d_sae=2048, k=16), backend="numba", n_threads=1)
    for step in range(3):
        assert trainer.step(activations(256, 64, step)).rescreened == 0


def test_equal_scores_at_the_edge_are_cut_to_the_number_wanted() -> None:
    """All tokens equal: every feature ties over the batch, and k·B entries are kept all the same."""
    own = config("batchtopk", k=3)
    trainer = SparseTrainer(own, backend="numba", n_threads=1)
    losses = trainer._engine.gradients(activations(1, 32, 5).expand(65, 32).contiguous(), None)
    assert losses.active == 3 * 65


def test_a_state_from_before_there_were_kinds_is_read() -> None:
    trainer = SparseTrainer(config_of(), backend="torch")
    state = trainer.state_dict()
    state["config"] = {k: v for k, v in state["config"].items() if k not in ("kind", "matryoshka_widths")}
    SparseTrainer(config_of(), backend="torch").load_state_dict(state)
    with pytest.raises(ValueError, match=r"state is of another SAE: kind='topk' \(here 'batchtopk'\)"):
        SparseTrainer(config("batchtopk"), backend="torch").load_state_dict(state)


def test_jumprelu_is_saelens_formula_at_any_width_of_activity() -> None:
    """Few and many active features, a threshold per feature, tokens on which nothing fires."""
    torch.manual_seed(0)
    sae = JumpReLUSAE(d_in=16, d_sae=40)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        getattr(sae, name).copy_(torch.randn_like(getattr(sae, name)))
    for threshold in (-1.0, 4.0, 11.0, 1e9):
        sae.threshold.copy_(threshold + torch.rand(40))
        x = torch.randn(3, 7, 16)
        a = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        wanted = a.relu() * (a > sae.threshold)
        index, value = sae.encode(x)
        dense = torch.zeros(3, 7, 40).scatter_add(-1, index, value)
        torch.testing.assert_close(dense, wanted)
        assert index.shape[-1] == max(1, int((wanted > 0).sum(-1).max()))
        torch.testing.assert_close(sae(x), wanted @ sae.W_dec + sae.b_dec, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="activations have width 15, the SAE d_in=16"):
        sae.encode(torch.zeros(2, 15))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "gated"}, "kind='gated' is unknown; choose topk, batchtopk, matryoshka"),
        ({"kind": "matryoshka"}, r"matryoshka_widths=\(\) must be positive, increase, and end with d_sae=512"),
        ({"kind": "matryoshka", "matryoshka_widths": (8, 8, 512)}, "must be positive, increase"),
        ({"kind": "matryoshka", "matryoshka_widths": (8, 100)}, "end with d_sae=512"),
        ({"kind": "batchtopk", "matryoshka_widths": (512,)}, "do not fit kind='batchtopk'; leave them empty"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**changes)
