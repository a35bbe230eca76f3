"""The sparse training step against dense autograd and SAELens; resume, nesting and packing bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.sae.engines import PARAMETERS, grouped_topk
from models.sae.trainer import SAEBank, SAEConfig, SparseTrainer, TopKSAE

ROOT = Path(__file__).resolve().parents[3]
SPARSE = ["torch", "numba"]


def activations(rows: int, width: int, seed: int) -> torch.Tensor:
    """Anisotropic, off-centre activations, so that no direction and no bias is special."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return torch.randn(rows, width, generator=generator) @ mix * 2 + 0.5


def config_of(**changes: object) -> SAEConfig:
    fields: dict = {"d_in": 32, "d_sae": 512, "k": 8, "seed": 1, "lr": 3e-3, "dead_after_steps": 2, **changes}
    return SAEConfig(**fields)


def reference_gradients(
    sae: TopKSAE, config: SAEConfig, x: torch.Tensor, dead: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients and loss by float64 autograd, written from the equations with nothing of the engines."""
    leaves = {name: getattr(sae, name).detach().double().requires_grad_() for name in PARAMETERS}
    W_enc, W_dec, b_enc, b_dec = leaves.values()
    x = x.double()
    norm = W_dec.norm(dim=-1) if config.rescale_acts_by_decoder_norm else torch.ones_like(b_enc)
    scores = ((x - b_dec if config.apply_b_dec_to_input else x) @ W_enc.T + b_enc) * norm
    values, indices = scores.topk(config.k, dim=-1)
    h = torch.zeros_like(scores).scatter(-1, indices, values.relu())
    x_hat = (h / norm) @ W_dec + b_dec
    loss = (x_hat - x).pow(2).sum(-1).mean()
    if dead is not None:
        masked = scores.masked_fill(~dead, -torch.inf)
        n_dead = int(dead.sum())
        values, indices = masked.topk(min(config.n_aux, n_dead), dim=-1)
        a = torch.zeros_like(scores).scatter(-1, indices, values)
        e_hat = (a / norm) @ W_dec
        scale = config.aux_coefficient * min(n_dead / config.n_aux, 1.0)
        loss = loss + scale * (e_hat - (x - x_hat).detach()).pow(2).sum(-1).mean()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(PARAMETERS, grads, strict=True)), loss.item()


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest deviation over the largest entry."""
    return ((got.double() - wanted).abs().max() / wanted.abs().max()).item()


def trained(config: SAEConfig, backend: str, steps: int = 4, rows: int = 256) -> SparseTrainer:
    trainer = SparseTrainer(config, backend=backend, n_threads=1)
    for step in range(steps):
        trainer.step(activations(rows, config.d_in, step))
    return trainer


VARIANTS = {
    "plain": {},
    "many dead": {"dead_after_steps": 0, "aux_k": 5},
    "few dead": {"dead_after_steps": 0, "aux_k": 500},
    "norms out": {"rescale_acts_by_decoder_norm": False},
    "b_dec out": {"apply_b_dec_to_input": False},
    "odd sizes": {"d_in": 29, "d_sae": 331, "k": 7},
    "several blocks, many dead": {"d_in": 70, "d_sae": 900, "k": 5, "dead_after_steps": 0, "aux_k": 9},
    "k near d_sae": {"d_sae": 64, "k": 61},
}


@pytest.mark.parametrize("backend", ["dense", "torch", "numba, int8", "numba, bfloat16", "numba, float32"])
@pytest.mark.parametrize("steps", [0, 4], ids=["untrained", "trained"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_autograd(
    backend: str, steps: int, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, every gradient to 1e-5 and the support (through what fired), with the auxiliary loss in them; numba with
    the screen of CPUs that multiply int8 and of those that do not."""
    backend, _, product = backend.partition(", ")
    monkeypatch.setattr("models.sae.screen.screen_precision", lambda: getattr(torch, product or "float32"))
    config = config_of(**VARIANTS[variant])
    trainer = trained(config, backend, steps)
    x = activations(200, config.d_in, 77)
    dead = trainer.dead if trainer.dead.any() else None
    if steps and variant.endswith("dead"):
        assert dead is not None
    wanted, loss = reference_gradients(trainer.sae, config, x, dead)
    losses = trainer._engine.gradients(x, None if dead is None else dead.nonzero().flatten())
    assert losses.mse + losses.aux == pytest.approx(loss, rel=1e-5)
    for name in PARAMETERS:
        assert relative_error(trainer._engine.gradient(name), wanted[name]) < 1e-5, name
    total = torch.cat([grad.flatten() for grad in wanted.values()]).norm().item()
    assert trainer._engine.grad_norm() == pytest.approx(total, rel=1e-5)
    idx, h = trainer.sae.encode(x)
    fired = torch.zeros(config.d_sae, dtype=torch.bool)
    fired[idx[h > 0]] = True
    assert torch.equal(losses.fired_M, fired)
    assert losses.active == int((h > 0).sum())


@pytest.mark.parametrize("backend", ["dense", *SPARSE])
def test_training_is_that_of_saelens(backend: str) -> None:
    """Twelve steps of SAELens' own trainer (AuxK active, clip, warm-up, Adam) against ours: losses and weights."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps, rows = 12, 128
    config = config_of(warmup_steps=4, dead_after_steps=2)
    torch.manual_seed(config.seed)
    theirs = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=config.d_in, d_sae=config.d_sae, k=config.k))
    batches = [activations(rows, config.d_in, step) for step in range(steps)]
    peer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=rows * steps,
            train_batch_size_samples=rows,
            lr=config.lr,
            lr_end=config.lr / 10,
            lr_warm_up_steps=config.warmup_steps,
            dead_feature_window=config.dead_after_steps,
        ),
        theirs,
        iter(batches),
    )
    trainer = SparseTrainer(config, backend=backend, n_threads=1)
    aux_seen = 0
    for batch in batches:
        assert trainer.lr_at(trainer.step_count) == pytest.approx(peer.optimizer.param_groups[0]["lr"])
        output = peer.step(batch)
        peer.n_training_steps += 1
        stats = trainer.step(batch)
        assert stats.mse == pytest.approx(output.losses["mse_loss"].item(), rel=1e-4)
        wanted = output.losses["auxiliary_reconstruction_loss"].item()
        assert stats.aux == pytest.approx(wanted, rel=1e-4)
        aux_seen += wanted > 0
        assert torch.equal(trainer.dead, peer.dead_neurons)
    assert aux_seen > 3
    for name in PARAMETERS:
        wanted_weight = getattr(theirs, name).detach()
        wanted_weight = wanted_weight.T if name == "W_enc" else wanted_weight
        # Adam divides by the gradient's size, so rounding of tiny gradients moves single weights by up to the rate
        deviation = (getattr(trainer.sae, name) - wanted_weight).norm() / wanted_weight.norm()
        assert deviation < 2e-4, name


@pytest.mark.usefixtures("int8")
@pytest.mark.parametrize("backend", SPARSE)
def test_support_is_exact_where_the_screen_is_blind(backend: str) -> None:
    """A component common to all tokens and features drowns the ranking in bfloat16; the step finds it all the same."""
    config = config_of(d_in=64, d_sae=1024, k=16)
    trainer = SparseTrainer(config, backend=backend, n_threads=1)
    trainer.sae.W_enc[:, 0] = 0.05
    trainer._engine.refresh()
    x = activations(128, 64, 5)
    x[:, 0] = 3000.0
    if backend == "torch":
        trainer._engine.screen_dtype = torch.bfloat16  # type: ignore[attr-defined]
    losses = trainer._engine.gradients(x, None)
    wanted, _ = reference_gradients(trainer.sae, config, x, None)
    assert losses.rescreened > 100
    for name in PARAMETERS:
        assert relative_error(trainer._engine.gradient(name), wanted[name]) < 1e-5, name


@pytest.mark.parametrize("backend", SPARSE)
def test_an_easy_screen_needs_no_second_look(backend: str) -> None:
    trainer = trained(config_of(d_in=64, d_sae=2048, k=16), backend, steps=3)
    assert trainer.step(activations(256, 64, 9)).rescreened <= 2


def assert_same_state(left: SparseTrainer, right: SparseTrainer) -> None:
    mine, theirs = left.state_dict(), right.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        same = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
        assert same, key


RESUME = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads({threads})
from test_topk_training import activations
from models.sae.trainer import SAEConfig, SparseTrainer
state = torch.load({path!r}, weights_only=True)
trainer = SparseTrainer(SAEConfig(**state["config"]), backend="dense", n_threads=1)
trainer.load_state_dict(state)
for step in range(4, 8):
    trainer.step(activations(256, 32, step))
torch.save(trainer.state_dict(), {path!r} + ".out")
"""


@pytest.mark.parametrize("backend", SPARSE)
def test_resume_in_a_fresh_process_is_the_uninterrupted_run(backend: str, tmp_path: Path) -> None:
    """Bit for bit, with dead features in play; the saved backend wins over the one asked for."""
    path = str(tmp_path / "state.pt")
    trainer = trained(config_of(), backend)
    torch.save(trainer.state_dict(), path)
    for step in range(4, 8):
        stats = trainer.step(activations(256, 32, step))
    assert stats.aux > 0
    script = RESUME.format(tests=str(Path(__file__).parent), threads=torch.get_num_threads(), path=path)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=None, timeout=300)
    resumed = SparseTrainer(config_of(), backend=backend, n_threads=1)
    resumed.load_state_dict(torch.load(path + ".out", weights_only=True))
    assert_same_state(trainer, resumed)


@pytest.mark.parametrize("backend", ["dense", *SPARSE])
def test_a_budget_inside_a_longer_run_is_the_separate_run(backend: str) -> None:
    config = config_of(warmup_steps=3)
    long = SparseTrainer(config, backend=backend, n_threads=1)
    for step in range(config.branch_step(4)):
        long.step(activations(256, 32, step))
    short = trained(config, backend, steps=4)
    assert_same_state(long, short)


def test_decay_branch_leaves_the_trunk_alone_and_ends_at_zero() -> None:
    config = config_of(schedule="wsd", warmup_steps=2, decay_steps=3)
    trunk = trained(config, "torch", steps=config.branch_step(7))
    branch = trunk.branch()
    rates = [branch.step(activations(256, 32, step)).lr for step in range(4, 7)]
    assert rates == pytest.approx([config.lr, config.lr * 2 / 3, config.lr / 3])
    with pytest.raises(RuntimeError, match="finished after 3 steps"):
        branch.step(activations(256, 32, 7))
    assert_same_state(trunk, trained(config, "torch", steps=4))
    assert trunk.step(activations(256, 32, 4)).lr == config.lr
    with pytest.raises(ValueError, match="decay branch already"):
        branch.branch()
    with pytest.raises(ValueError, match="constant"):
        SparseTrainer(config_of(), backend="torch").branch()
    with pytest.raises(ValueError, match="lies in the warm-up"):
        SparseTrainer(config, backend="torch").branch()


def test_a_resumed_branch_goes_on_decaying() -> None:
    config = config_of(schedule="wsd", decay_steps=4)
    branch = trained(config, "torch", steps=2).branch()
    branch.step(activations(256, 32, 2))
    resumed = SparseTrainer(config, backend="torch")
    resumed.load_state_dict(branch.state_dict())
    assert resumed.step(activations(256, 32, 3)).lr == pytest.approx(config.lr * 3 / 4)


@pytest.mark.parametrize("backend", SPARSE)
def test_packed_is_alone(backend: str) -> None:
    """Cells of other k, seed, width of dictionary and layer in the same bank change no bit of a cell."""
    cells = {
        "small": (1, config_of(k=4)),
        "big": (1, config_of(k=24, seed=5)),
        "wide": (3, config_of(d_sae=700, seed=2)),
        "late": (3, config_of(seed=9, aux_coefficient=0.0)),
    }
    bank = SAEBank(cells, backend=backend, n_threads=1)
    assert list(bank.trainers) == list(cells)
    batches = [{1: activations(256, 32, s), 3: activations(256, 32, 100 + s)} for s in range(5)]
    for batch in batches:
        stats = bank.step(batch)
    assert list(stats) == list(cells)
    for key, (layer, config) in cells.items():
        alone = SparseTrainer(config, backend=backend, n_threads=1)
        for batch in batches:
            alone.step(batch[layer])
        assert_same_state(bank.trainers[key], alone)


@pytest.mark.parametrize("backend", ["dense", *SPARSE])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_bad_activations_are_named_before_any_weight_moves(backend: str, poison: float) -> None:
    bank = SAEBank({"a": (0, config_of()), "b": (3, config_of())}, backend=backend, n_threads=1)
    good = activations(64, 32, 0)
    bank.step({0: good, 3: good})
    before = {key: value.clone() for key, value in bank.trainers["a"].state_dict().items() if torch.is_tensor(value)}
    bad = good.clone()
    bad[5, 7] = poison
    with pytest.raises(ValueError, match="layer 3: 1 of 2048 activations are NaN or inf at step 1; no weight"):
        bank.step({0: good, 3: bad})
    with pytest.raises(ValueError, match="layer 3 is missing from the batch, which has layers \\[0\\]"):
        bank.step({0: good})
    with pytest.raises(ValueError, match=r"activations of shape \(64, 31\) are not \[B, d_in=32\]"):
        bank.step({0: good, 3: good[:, 1:]})
    after = bank.trainers["a"].state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert bank.trainers["a"].step_count == 1


@pytest.mark.parametrize("backend", ["dense", *SPARSE])
def test_overflowing_gradients_are_refused(backend: str) -> None:
    trainer = SparseTrainer(config_of(), backend=backend, n_threads=1)
    before = trainer.sae.W_dec.clone()
    with pytest.raises(FloatingPointError, match="no weight was changed"):
        trainer.step(activations(64, 32, 0) * 1e25)
    assert torch.equal(trainer.sae.W_dec, before)
    assert trainer.step_count == 0


def test_state_of_another_sae_is_refused() -> None:
    state = SparseTrainer(config_of(), backend="torch").state_dict()
    with pytest.raises(ValueError, match=r"state is of another SAE: k=8 \(here 9\)"):
        SparseTrainer(config_of(k=9), backend="torch").load_state_dict(state)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="choose auto, numba, torch or dense"):
        SparseTrainer(config_of(), backend="cuda")  # type: ignore[arg-type]


@pytest.mark.usefixtures("int8")
@pytest.mark.parametrize("second", [torch.bfloat16, torch.float32])
def test_activations_that_int8_cannot_hold_turn_the_screen_to_more_bits_and_back(
    monkeypatch: pytest.MonkeyPatch, second: torch.dtype
) -> None:
    """One enormous coordinate a token leaves nothing of the others in eight bits: the support stays exact, the engine
    screens in bfloat16 or float32 for a while, and a copy that resumes in between does the same."""
    monkeypatch.setattr("models.sae.screen.bfloat16_is_faster", lambda: second == torch.bfloat16)
    monkeypatch.setattr("models.sae.screen.HOLD_STEPS", 3)
    config = config_of(d_in=64, d_sae=1024, k=4)
    trainer = SparseTrainer(config, backend="numba", n_threads=1)
    x = activations(128, 64, 5)
    x[:, 3] = 4000.0 * torch.sign(x[:, 3])
    trainer.sae.W_enc[:, 3] = 0.0
    trainer._engine.refresh()
    wanted, _ = reference_gradients(trainer.sae, config, x, None)
    losses = trainer._engine.gradients(x, None)
    assert losses.rescreened > 0.02 * len(x)
    for name in PARAMETERS:
        assert relative_error(trainer._engine.gradient(name), wanted[name]) < 1e-5, name
    seen = []
    for _ in range(2):
        trainer.step(x)
        seen.append(trainer._engine.screen_dtype)  # type: ignore[attr-defined]
    assert seen == [second] * 2
    twin = SparseTrainer(config, backend="numba", n_threads=1)
    twin.load_state_dict(trainer.state_dict())
    easy = activations(128, 64, 6)
    for _ in range(2):
        trainer.step(easy)
        twin.step(easy)
    assert trainer._engine.screen_dtype == torch.int8  # type: ignore[attr-defined]
    assert_same_state(trainer, twin)


@pytest.mark.parametrize(("features", "k"), [(512, 1), (512, 20), (512, 512), (331, 5), (96, 40)])
def test_topk_by_groups_is_topk(features: int, k: int) -> None:
    """Groups of several features, groups of one, and sizes that groups do not divide; with ties among the scores."""
    scores = torch.randn(40, features, generator=torch.Generator().manual_seed(2)).bfloat16()
    values, indices = grouped_topk(scores, k)
    assert torch.equal(scores.gather(1, indices), values)
    assert torch.equal(values.sort().values, scores.topk(k).values.sort().values)
    assert all(len(row.unique()) == k for row in indices)


def test_threads_change_no_bit_of_the_kernels() -> None:
    one, two = (SparseTrainer(config_of(d_in=70), backend="numba", n_threads=n) for n in (1, 2))
    for step in range(4):
        batch = activations(250, 70, step)
        one.step(batch)
        two.step(batch)
    assert_same_state(one, two)
