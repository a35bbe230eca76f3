"""Trains a pack of SAEs on one language-model pass and publishes each cell when its budget is reached.

Shape suffixes: B tokens of a step, N tokens of a shuffle block, D = d_model, T context.

The stream is cut into blocks of `shuffle_sequences` sequences. A block's activations (every hooked layer, one LM
pass) are permuted by a seed that depends on the block's number alone and served as consecutive steps. So step s of
every SAE of a model sees the same tokens whatever else is in the pack, a restart needs no buffer (it redoes the
block its step lies in), and the shuffle's memory is one block.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from data.token_stream import CorruptShard
from models.sae.trainer import SAEBank, SAEConfig, SparseTrainer, StepStats
from sweeps.core.cells import Row, UserError, digest
from sweeps.core.machine import hardware, user_cache
from sweeps.launch.context import PackContext
from sweeps.launch.stop import PackStopped
from sweeps.ledger.storage import Store
from sweeps.sae.cells import sae_config
from sweeps.sae.evaluate import Evaluation
from sweeps.sae.origin import trajectory_name
from sweeps.sae.sources import corrupt, open_stream, start_pack
from sweeps.sae.tokens import kept_tokens, leaves_out, replace_dropped

if TYPE_CHECKING:
    from models.host.host_lm import HostLM
    from sweeps.sae.cells import SAECell
_LM_BATCH = 16  # sequences per forward pass while activations are collected
_CURVE_POINTS = 64  # per octave of steps: the same points whatever budgets a run has
_SAVE_PAUSE = 20  # pause before the next checkpoint, in durations of the last: at most 5% of the time goes there


@dataclass
class Trajectory:
    """One SAE on its way through the budgets of its cells, with the decay branches that have left it.

    All of it stands at one step: the trunk advances to its last branching point, each branch to its budget.
    """

    key: tuple[Any, ...]
    name: str
    cells: list[SAECell]  # not yet published, by budget
    config: SAEConfig
    trainer: SparseTrainer
    branches: dict[int, SparseTrainer] = field(default_factory=dict)  # by budget in steps
    curves: dict[int, list[tuple[int, float, float, int]]] = field(default_factory=dict)
    # by branch budget, 0 for the trunk: step, loss, grad norm, dead features
    block: tuple[int, int] = (0, 0)  # shuffle block of the last step, index of its first sequence
    trunk_block: tuple[int, int] = (0, 0)  # the same of the trunk's last step
    spoilt: bool = False  # some cell of it was given up

    @property
    def layer(self) -> int:
        return self.cells[0].layer

    @property
    def step_count(self) -> int:
        return max([self.trainer.step_count, *(b.step_count for b in self.branches.values())])

    def branch_off(self) -> None:
        """Start the decay branches that leave the trunk at this step."""
        for cell in self.cells:
            leaves = self.config.branch_step(cell.steps)
            if leaves < cell.steps and leaves == self.trainer.step_count and cell.steps not in self.branches:
                self.branches[cell.steps] = self.trainer.branch()

    def running(self) -> list[tuple[int, SparseTrainer]]:
        """Trunk (as budget 0) and branches that have a step to do."""
        end = max(self.config.branch_step(cell.steps) for cell in self.cells)
        trunk = [(0, self.trainer)] if self.trainer.step_count < end else []
        return trunk + [(budget, b) for budget, b in self.branches.items() if b.step_count < budget]

    def trainer_of(self, cell: SAECell) -> SparseTrainer:
        """The cell's branch, or the trunk as long as it has none."""
        return self.branches.get(cell.steps, self.trainer)

    def drop(self, cell: SAECell) -> None:
        """Forget a cell that is published or given up."""
        self.cells.remove(cell)
        self.branches.pop(cell.steps, None)

    def finished(self, cell: SAECell) -> SparseTrainer | None:
        """The trainer that stands at the cell's budget, if one does."""
        trainer = self.trainer_of(cell)
        at_end = self.config.branch_step(cell.steps) == cell.steps or cell.steps in self.branches
        return trainer if at_end and trainer.step_count == cell.steps else None

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step_count,
            "trunk": self.trainer.state_dict(),
            "branches": {str(budget): b.state_dict() for budget, b in self.branches.items()},
            "curves": json.dumps(self.curves),
            "block": list(self.block),
        }

    def kept(self) -> dict[str, Any]:
        """The trunk alone, without branches: what a larger budget continues from."""
        return self.state() | {"step": self.trainer.step_count, "branches": {}, "block": list(self.trunk_block)}

    def restore(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["trunk"])
        for budget, branch in state["branches"].items():
            twin = SparseTrainer(
                self.config,
                backend=self.trainer.backend,
                n_threads=self.trainer.n_threads,
                device=self.trainer.device,
                name=self.trainer.name,
                scratch=self.trainer.scratch,
            )
            twin.load_state_dict(branch)
            self.branches[int(budget)] = twin
        for budget, points in json.loads(state["curves"]).items():
            self.curves[int(budget)] = [(int(n), float(x), float(g), int(d)) for n, x, g, d in points]
        self.block = (int(state["block"][0]), int(state["block"][1]))
        if int(state["step"]) == self.trainer.step_count:  # else a larger budget looks for the trunk's from the start
            self.trunk_block = self.block


def backend(d_in: int, device: str, threads: int) -> Literal["numba", "torch"]:
    """The SAE step's backend: measured once per machine and kept, so that packs and restarts agree bit for bit.

    What was measured without dead features (folder sae_backend of earlier versions) is not read.
    """
    if device != "cpu":
        return "torch"
    store = Store(str(user_cache()))
    name = f"sae_step_backend/{digest([hardware(), torch.__version__, d_in, threads])[:16]}.json"
    known = store.read_json(name)
    if known is None:
        config = SAEConfig(d_in=d_in, d_sae=8 * d_in, k=16, seed=0)
        trainer = SparseTrainer(config, backend="auto", n_threads=threads)
        store.create(name, json.dumps({"backend": trainer.backend}).encode())
        known = store.read_json(name)
    assert known is not None
    return known["backend"]


def train_pack(cells: Sequence[SAECell], context: PackContext, files: Mapping[str, bytes] | None = None) -> None:
    """Train, evaluate and publish every cell; all must share model, stream, context, batch and shuffle.

    A cell whose SAE diverges is recorded as failed and the others go on. Every cell gets `files` in addition to its
    own. Raises UserError where none can be trained.
    """
    cells, lm = start_pack(cells, context)
    if lm is None:
        return
    try:
        _PackRun(cells, lm, context, files or {}).go()
    except CorruptShard as error:
        raise corrupt(error) from error


class _PackRun:
    def __init__(self, cells: Sequence[SAECell], lm: HostLM, context: PackContext, files: Mapping[str, bytes]) -> None:
        self.lm, self.context, self.first, self.files = lm, context, cells[0], files
        longest = max(c.tokens for c in cells)
        self.stream = open_stream(
            self.first, context.run, lm.tokenizer_dir, tokens=longest, say=lambda line: context.progress(phase=line)
        )
        try:
            self.stream.require(longest, self.first.held_out_end)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.batch = self.first.batch_tokens
        self.block_steps = self.first.shuffle_sequences * self.first.context // self.batch
        self.layers = sorted({c.layer for c in cells})
        groups: dict[tuple[Any, ...], list[SAECell]] = {}
        for cell in cells:
            groups.setdefault(cell.trajectory(), []).append(cell)
        configs: dict[Any, tuple[int, SAEConfig]] = {
            key: (group[0].layer, sae_config(group[0], lm.d_model)) for key, group in groups.items()
        }
        chosen = backend(lm.d_model, context.device, context.threads)
        self.bank = SAEBank(configs, n_threads=context.threads, device=context.device, backend=chosen)
        self.trajectories = [
            Trajectory(
                key=key,
                name=trajectory_name(group[0], context.run),
                cells=sorted(group, key=lambda c: c.tokens),
                config=configs[key][1],
                trainer=self.bank.trainers[key],
            )
            for key, group in groups.items()
        ]
        self._last = max(c.steps for c in cells)
        self._saved = time.monotonic()
        self._save_took = 0.0
        self._began = (time.monotonic(), 0)
        self._best = float("-inf")
        self._rate = float("nan")

    def go(self) -> None:
        self.evaluation = Evaluation(self.lm, self.stream, self.layers, self.first, self.context)
        for t in self.trajectories:
            self._resume(t)
        self._finish_due()
        if not self.trajectories:
            return
        self.context.begin(*(cell for t in self.trajectories for cell in t.cells))
        step = min(t.step_count for t in self.trajectories)
        self._began = (time.monotonic(), step)
        with contextlib.closing(self._blocks()) as blocks:
            for block, index, acts_ND in blocks:
                self._train_block((block, index), step, acts_ND)
                if not self.trajectories:
                    return
        t = self.trajectories[0]
        raise UserError(
            f"the stream ended at {t.step_count * self.batch} of {t.cells[-1].tokens} tokens; choose a smaller budget"
        )

    def _train_block(self, at: tuple[int, int], step: int, acts_ND: Mapping[int, torch.Tensor]) -> None:
        """The steps of one shuffle block from `step` on. at: the block, and the index of its first sequence."""
        first = at[0] * self.block_steps
        for number in range(max(step, first), first + self.block_steps):
            row = (number - first) * self.batch
            self._step(number, at, {layer: a[row : row + self.batch] for layer, a in acts_ND.items()})
            self._finish_due()
            self._tell(number + 1)
            if not self.trajectories:
                return
            self._stop_if_asked()
            if time.monotonic() - self._saved > max(self.context.run.checkpoint_seconds, _SAVE_PAUSE * self._save_took):
                self._checkpoint()

    def _resume(self, t: Trajectory) -> None:
        """Continue from the checkpoint, unless a budget without a branch needs the trunk at an earlier step."""
        state = self.context.work.load(t.name)
        if state is None:
            return
        leaves = [t.config.branch_step(c.steps) for c in t.cells if str(c.steps) not in state["branches"]]
        # a trunk that no branch was to leave any more stopped while its branches went on
        if not leaves or int(state["step"]) == int(state["trunk"]["step"]) <= min(leaves):
            t.restore(state)

    def _blocks(self) -> Generator[tuple[int, int, dict[int, torch.Tensor]]]:
        """From the slowest SAE's shuffle block on: (block, index of its first sequence, permuted activations)."""
        n = self.first.shuffle_sequences
        # indices have gaps where a corrupt shard was skipped, so a checkpoint says where its block began; at the end
        # of a block that block is read again, as only reading tells where the next one begins
        block, start = min(self.trajectories, key=lambda t: t.step_count).block
        parts: list[tuple[int, np.ndarray]] = []
        # closed with this generator: what reads ahead ends then
        with contextlib.closing(self.stream.sequences(start)) as reader:
            for index, tokens_nT in reader:
                if self.evaluation.text.training(index, tokens_nT):
                    self.context.note(self.evaluation.text.line())
                parts.append((index, tokens_nT))
                while sum(len(tokens) for _, tokens in parts) >= n:
                    rows = np.concatenate([tokens for _, tokens in parts])
                    yield block, parts[0][0], self._activations(rows[:n], block)
                    left = len(rows) - n
                    parts = [(index + len(tokens_nT) - left, rows[n:])] if left else []
                    block += 1
        if parts:
            yield block, parts[0][0], self._activations(np.concatenate([tokens for _, tokens in parts]), block)

    def _activations(self, tokens_NT: np.ndarray, block: int) -> dict[int, torch.Tensor]:
        """Activations of a block in its shuffled order, {layer: [N, D] float32}."""
        n, width = tokens_NT.size, self.lm.d_model
        device = torch.device(self.context.device)
        place = torch.from_numpy(np.random.default_rng([block, n]).permutation(n)).to(device)
        out = {layer: torch.empty(n, width, device=device) for layer in self.layers}
        for i in range(0, len(tokens_NT), _LM_BATCH):
            self.context.progress(phase=f"activations of block {block + 1}, sequence {i} of {len(tokens_NT)}")
            if i:  # a block of a large model takes minutes on CPUs; a pod's notice is shorter
                self._stop_if_asked()
            tokens_BT = torch.from_numpy(tokens_NT[i : i + _LM_BATCH].astype(np.int64)).to(device)
            rows = place[i * self.first.context :][: tokens_BT.numel()]
            for layer, a_BTD in self.lm.activations(tokens_BT, self.layers).items():
                out[layer][rows] = a_BTD.flatten(0, 1)
        for a_ND in out.values() if leaves_out(self.first) else ():
            kept_ST = kept_tokens(a_ND.norm(dim=1)[place].reshape(tokens_NT.shape), self.first)
            replace_dropped(a_ND, torch.empty_like(kept_ST.flatten()).index_copy_(0, place, kept_ST.flatten()))
        return out

    def _step(self, number: int, block: tuple[int, int], acts_BD: dict[int, torch.Tensor]) -> None:
        """Step `number` of the stream for every SAE that stands there."""
        if len(acts_BD[self.layers[0]]) < self.batch:
            return  # the stream's last, partial batch
        for t in self.trajectories:
            if t.step_count != number:
                continue
            t.branch_off()
            x_BD = acts_BD[t.layer]
            for budget, trainer in t.running():
                try:
                    stats = trainer.step(x_BD)
                except FloatingPointError as error:
                    self._give_up(t, [c for c in t.cells if t.trainer_of(c) is trainer], error)
                    t.branches.pop(budget, None)  # also that of a cell which is not planned here
                    continue
                except ValueError as error:
                    raise UserError(str(error)) from error
                self._show(t, trainer, stats)
                if trainer is t.trainer:
                    t.trunk_block = block
                if stats.step % max(1, 2 ** (stats.step.bit_length() - 1) // _CURVE_POINTS) == 0:
                    t.curves.setdefault(budget, []).append((stats.step, stats.loss, stats.grad_norm, stats.dead))
            t.block = block
        self._forget_finished()

    def _show(self, t: Trajectory, trainer: SparseTrainer, stats: StepStats) -> None:
        """Tell MLflow of a step: of the trunk for every cell that has not left it."""
        values = {
            "train_loss": stats.loss,
            "train_grad_norm": stats.grad_norm,
            "train_dead": stats.dead,
            "learning_rate": stats.lr,
            "tokens_per_second": self._rate,
        }
        for cell in t.cells:
            if t.trainer_of(cell) is trainer:
                self.context.curve(cell, stats.step * cell.batch_tokens, values)

    def _finish_due(self) -> None:
        """Evaluate and publish the cells whose budget is reached; forget SAEs with no cell left."""
        due = [(t, t.cells[0], done) for t in self.trajectories if (done := t.finished(t.cells[0])) is not None]
        if not due:
            return
        for i, (t, cell, trainer) in enumerate(due):
            self.context.progress(force=True, phase=f"evaluating SAE {i + 1} of {len(due)}")
            sae = trainer.inference()
            try:
                rows, tables, ce_rec = self.evaluation.run(cell, sae)
            except ValueError as error:  # this SAE's outputs have no value; the others are still evaluated
                self._give_up(t, [cell], error)
                continue
            self._best = max(self._best, ce_rec)
            files = {**tables, **self.evaluation.saelens_files(cell, sae), **self.files}
            self.context.publish(cell, [*rows, *_curve_rows(t, cell)], files)
            self.context.progress(best=self._best)
            t.drop(cell)
        self._forget_finished()

    def _give_up(self, t: Trajectory, cells: Sequence[SAECell], error: Exception) -> None:
        """Record as failed the cells that this SAE's own numbers spoil; each would fail alone, too."""
        t.spoilt = True
        for cell in cells:
            self.context.fail(cell, str(error))
            t.drop(cell)

    def _forget_finished(self) -> None:
        for t in self.trajectories:
            if not t.cells:
                if self.context.run.keep_checkpoints and not t.spoilt:
                    self.context.work.save(t.name, t.trainer.step_count, t.kept())
                else:
                    self.context.work.drop(t.name)
                self.bank.pop(t.key)
        self.trajectories = [t for t in self.trajectories if t.cells]

    def _stop_if_asked(self) -> None:
        """Raises PackStopped with every SAE saved when the launch is being stopped."""
        if self.context.stopping():
            self._checkpoint()
            step = min(t.step_count for t in self.trajectories)
            raise PackStopped(f"stopped at step {step}; its checkpoints are kept")

    def _checkpoint(self) -> None:
        began = time.monotonic()
        for t in self.trajectories:
            self.context.work.save(t.name, t.step_count, t.state())
        self._saved = time.monotonic()
        self._save_took = self._saved - began

    def _tell(self, step: int) -> None:
        then, start = self._began
        self._rate = rate = (step - start) * self.batch / max(1e-6, time.monotonic() - then)
        self.context.progress(
            done=step * self.batch,
            total=self._last * self.batch,
            rate=rate,
            eta=(self._last - step) * self.batch / max(rate, 1e-9),
            phase=f"training {len(self.trajectories)} SAEs",
        )


def _curve_rows(t: Trajectory, cell: SAECell) -> list[Row]:
    leaves = t.config.branch_step(cell.steps)
    points = [p for p in t.curves.get(0, []) if p[0] <= leaves] + t.curves.get(cell.steps, [])
    rows = []
    for step, loss, norm, dead in points:
        at = {"step": step * cell.batch_tokens}
        rows += [
            Row("train_loss", loss, "squared norm", at),
            Row("train_grad_norm", norm, "", at),
            Row("train_dead", dead, "features", at),
        ]
    return rows
