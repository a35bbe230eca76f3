"""One model from its first step to its published cell."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from analysis.codec.scores import CodebookScores
from data.token_batches import TokenClips, collate, epoch_batches
from models.codec.cost import lm_cost
from models.codec.delay import training_pair
from models.codec.model import CodecLM, CodecLMConfig, build_codec_lm, config_facts
from sweeps.codec.audio import cell_audio
from sweeps.codec.checkpoint import checkpoint_facts
from sweeps.codec.clip_tables import LAYER, clip_table, gate_numbers, gate_table
from sweeps.codec.corpora import TokenSource
from sweeps.codec.evaluate import WEIGHTS, evaluate, nll_rows
from sweeps.codec.loop import Batch, Owner, Pace, StepStats, TrainConfig, Trainer, train
from sweeps.codec.texts import NO_TEXT, SHUFFLED, given_texts, shuffled_texts
from sweeps.core.cells import Row, UserError
from sweeps.launch.context import PackContext

if TYPE_CHECKING:
    from sweeps.codec.cells import LMCell, Study


class TrainingStream:
    """The batch of each step: epoch and place in it follow from the step alone, so nothing needs to be saved."""

    def __init__(self, clips: TokenClips, cell: LMCell, config: CodecLMConfig, device: str) -> None:
        self.clips, self.cell, self.config, self.device = clips, cell, config, device
        self._epoch, self._first = 0, 0  # epoch and first step of the current plan
        self._plan = self._plan_of(0)

    def _plan_of(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        return epoch_batches(self.clips, self.cell.batch_size, seed=self.cell.seed, epoch=epoch)

    def __call__(self, step: int) -> Batch:
        if step < self._first:
            self._epoch, self._first, self._plan = 0, 0, self._plan_of(0)
        while step >= self._first + len(self._plan):
            self._epoch, self._first = self._epoch + 1, self._first + len(self._plan)
            self._plan = self._plan_of(self._epoch)
        place = step - self._first
        seed = self.cell.seed + 1_000_003 * self._epoch
        batch = collate(self.clips, self._plan[place].tolist(), place, self.config.max_frames, seed)
        inputs, targets = training_pair(batch.codes_BKT, pad=self.config.pad, bos=self.config.bos)
        texts = given_texts(self.config, self.cell.texts_at(step, batch.texts), self.device)
        return Batch(inputs.to(self.device), targets.to(self.device), batch.real_tokens, texts)


def _on_the_way(trainer: Trainer, stats: StepStats, rate: float) -> dict[str, float]:
    """What MLflow shows of a step: the step's own numbers, and held-out ones where the step was measured."""
    measured = itertools.takewhile(lambda point: point[1] == stats.step, reversed(trainer.curve))
    return {
        "train_loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "learning_rate": trainer.config.lr_at(stats.step - 1),
        "tokens_per_second": rate,
        **{metric: value for metric, _, value in measured if metric.startswith("val_nll")},
    }


@dataclass(frozen=True)
class _Final:
    """Measurements after training: of each of WEIGHTS, of the best averaged weights, and of averaged ones given other
    texts than the clips' own, by kind."""

    scores: Mapping[str, CodebookScores]
    best: CodecLM | None
    best_scores: CodebookScores | None
    other_texts: Mapping[str, CodebookScores]


class CellRun(Owner):
    def __init__(
        self,
        cell: LMCell,
        study: Study,
        source: TokenSource,
        train_clips: TokenClips,
        held_out: TokenClips,
        context: PackContext,
        baseline: float,
        left_out: dict[str, int],
    ) -> None:
        self.baseline, self.left_out = baseline, left_out
        self.cell, self.study, self.source, self.held_out, self.context = cell, study, source, held_out, context
        self.whole = cell.whole()  # names the checkpoints, which a stopped cell and the whole training share
        self.config = cell.lm_config()
        codec = source.codec
        if (codec.n_codebooks, codec.codebook_size) != (self.config.n_codebooks, self.config.codebook_size):
            raise UserError(
                f"{codec.name} has {codec.n_codebooks} codebooks of {codec.codebook_size}, the scale {cell.scale} "
                f"models {self.config.n_codebooks} of {self.config.codebook_size}; choose another codec or scale"
            )
        model = build_codec_lm(self.config, device=context.device, seed=cell.seed)
        self.trainer = Trainer(
            model,
            TrainConfig(
                steps=cell.steps,
                lr=cell.lr,
                lr_end=cell.lr_end,
                warmup_steps=cell.warmup_steps,
                ema_decay=cell.ema_decay,
                precision=cell.precision,
                micro_batch=study.micro_batch,
            ),
            world=context.world,
            maker=f"{cell.SWEEP} version {cell.VERSION}",
            seed=cell.seed,
        )
        self.stream = TrainingStream(train_clips, cell, self.config, context.device)
        self._scored: dict[CodecLM, tuple[tuple[int, int], CodebookScores]] = {}

    def go(self) -> None:
        """Train to the last step, or to where the cell is stopped, and publish."""
        rate = self.train_to(self.cell.end)
        self.publish(rate)

    def train_to(self, step: int) -> float:
        """Continue from the checkpoint, if there is one, to a step; returns real tokens per second."""
        cell, context = self.cell, self.context
        self._resume()
        run = context.run
        pace = Pace(
            eval_every=cell.eval_every,
            save_seconds=run.checkpoint_seconds,
            save_steps=run.checkpoint_steps,
            measure_end=not cell.stop_at,  # a measurement that the whole training has not would change its curve
        )
        return train(self.trainer, self.stream, self, pace, until=step)

    def save(self, trainer: Trainer) -> None:
        self._keep("latest", trainer.step_count, trainer.state())

    def keep_best(self, trainer: Trainer) -> None:
        self._keep("best", trainer.step_count, {"step": trainer.step_count, "ema": trainer.ema.state_dict()})

    def stopping(self) -> bool:
        return self.context.stopping()

    def _resume(self) -> None:
        """Take the checkpoint in, if there is one; here, so that training does not hold it as well."""
        cell, context = self.cell, self.context
        state = context.work.load(self.whole.key, origin=self._origin)
        if len({int(s["step"]) if s else 0 for s in context.world.gather(state and {"step": state["step"]})}) > 1:
            raise RuntimeError("the processes read checkpoints of different steps; an older group still wrote")
        if state is not None and int(state["step"]) <= cell.end:  # a later rung's is of no use to an earlier one
            self.trainer.restore(state)
            if state["processes"] != context.world.size:
                context.note(
                    f"{cell.architecture}: step {state['step']} was reached with {state['processes']} processes, now "
                    f"there are {context.world.size}; the trajectory changes by rounding"
                )

    @property
    def _origin(self) -> str:
        return self.context.fingerprint(self.whole)

    def _keep(self, kind: str, step: int, state: dict[str, Any]) -> None:
        """Save a checkpoint; where that fails the one before it stays and training goes on."""
        try:
            self.context.work.save(self.whole.key, step, state, kind, self._origin)
        except OSError as error:
            old = self.context.work.step(self.whole.key, kind)
            self.context.note(
                f"{self.cell.architecture}: the {kind} checkpoint of step {step} could not be saved ({error}); that of "
                f"step {old} stays and training goes on"
            )

    def publish(self, rate: float) -> None:
        """Evaluate in all processes; sample and publish in the first. rate: real tokens per second, or NaN."""
        cell, context = self.cell, self.context
        context.progress(force=True, phase=f"{cell.architecture}: evaluating and sampling")
        final = self._evaluate_all()
        if not context.world.first:
            return
        rows, files = self._final_rows(final, rate), self._files(final)
        if cell.stop_at:  # its weights are those of a checkpoint, which goes on or is forgotten
            context.publish(cell, rows, files)
            if not context.run.keep_checkpoints:
                context.work.drop(self.whole.key)
            return
        with tempfile.TemporaryDirectory() as folder:  # the weights of large models are not held a second time
            weights = self._checkpoint(final.best, Path(folder, "model.pt"))
            context.publish(cell, rows, files | {"model.pt": weights})
        context.work.drop(cell.key)

    def _evaluate_all(self) -> _Final:
        n_clips = self.cell.eval_clips
        of = {w: self._scores(m, n_clips) for w, m in zip(WEIGHTS, (self.trainer.model, self.trainer.ema), strict=True)}
        best = self._best()
        best_scores = None if best is None else self._scores(best, n_clips)
        return _Final(of, best, best_scores, self._scores_with_other_texts())

    def _final_rows(self, final: _Final, rate: float) -> list[Row]:
        """All rows of the cell; MLflow's compare page opens on the first of them."""
        rows = []
        for weights in reversed(WEIGHTS):
            rows += self._score_rows(final.scores[weights], weights)
        if final.best_scores is not None:
            rows += self._score_rows(final.best_scores, "best")
        for kind, scores in final.other_texts.items():
            rows += nll_rows(scores, f"final_val_nll_{kind}", {"weights": "ema"})
        rows += [*self._curve_rows(), *self._static_rows(), Row("unigram_nll", self.baseline, "nats a token")]
        if not math.isnan(rate):
            rows.append(Row("tokens_per_second", rate, "tokens/s"))
        if self.trainer.step_count < self.cell.steps:
            rows.append(Row("stopped_at", self.trainer.step_count, "steps"))
        return rows

    def _files(self, final: _Final) -> dict[str, bytes | Path]:
        """All files of the cell but its weights."""
        cell, trainer = self.cell, self.trainer
        files: dict[str, bytes | Path] = {
            "clips.parquet": clip_table(final.scores, self.held_out, cell.eval_clips, final.other_texts)
        }
        if self.config.memory_cache is not None:
            start = build_codec_lm(self.config, device=self.context.device, seed=cell.seed)
            models = {**dict(zip(WEIGHTS, (trainer.model, trainer.ema), strict=True)), "start": start}
            files["gates.parquet"] = gate_table(models, self.held_out, cell.eval_clips, cell.precision)
        if self.study.sample_s > 0 and not cell.stop_at:
            files |= cell_audio(trainer.ema, cell, self.study, self.source, self.held_out, self.stream.clips)
        return files | {"tokens.json": json.dumps(self._tokens(), indent=1).encode()}

    def _best(self) -> CodecLM | None:
        """Averaged weights of the best measurement; None where that is the last one, or was not saved."""
        if self.trainer.best is None or self.trainer.best[0] == self.trainer.step_count:
            return None
        state = self.context.work.load(self.whole.key, "best", self._origin)
        if state is None or state["step"] != self.trainer.best[0]:
            return None
        model = build_codec_lm(self.config, device=self.context.device, seed=self.cell.seed)
        model.load_state_dict(state["ema"])
        return model

    def _scores(self, model: CodecLM, n_clips: int) -> CodebookScores:
        """Of a model's present weights; what the last measurement of the curve has is not computed again."""
        asked = self.trainer.step_count, min(n_clips, len(self.held_out))
        at, scores = self._scored.get(model, (None, None))
        if scores is None or at != asked:
            scores = evaluate(model, self.held_out, n_clips, self.cell.precision, self.context.world)
            self._scored[model] = asked, scores
        return scores

    def _scores_with_other_texts(self) -> dict[str, CodebookScores]:
        """Of the averaged weights, given another clip's text and none; empty without text conditioning."""
        if self.config.text is None:
            return {}
        wrong = {SHUFFLED: shuffled_texts(self.held_out), NO_TEXT: [""] * len(self.held_out)}
        cell, world = self.cell, self.context.world
        return {
            kind: evaluate(self.trainer.ema, self.held_out.with_texts(t), cell.eval_clips, cell.precision, world)
            for kind, t in wrong.items()
        }

    def evaluate(self, model: CodecLM) -> dict[str, float]:
        scores = self._scores(model, self.cell.curve_clips)
        value = scores.val_nll()
        self.context.progress(best=self.baseline - value)
        interval = scores.val_nll_ci()
        numbers = {"val_nll": value, "val_loss_smoothed": scores.val_loss_smoothed()}
        if math.isfinite(interval.lo):
            numbers |= {"val_nll_lo": interval.lo, "val_nll_hi": interval.hi}
        return numbers | gate_numbers(model, self.held_out, self.cell.curve_clips, self.cell.precision)

    def report(self, trainer: Trainer, stats: StepStats, rate: float) -> None:
        self.context.curve(self.cell, stats.step, _on_the_way(trainer, stats, rate))
        left = (self.cell.end - stats.step) / max(stats.step, 1) * trainer.real_tokens
        self.context.progress(
            done=trainer.real_tokens,
            total=int(trainer.real_tokens + left),
            rate=rate,
            eta=left / max(rate, 1e-9),
            phase=f"{self.cell.architecture}: step {stats.step}/{self.cell.end}, loss {stats.loss:.3f}",
        )

    def _static_rows(self) -> list[Row]:
        cost = lm_cost(self.config)
        tokens = self.source.tokens.manifest
        return [
            Row("n_parameters", cost.parameters),
            Row("flops_per_column", cost.flops_per_token, "FLOP"),
            Row("train_tokens", self.trainer.real_tokens, "tokens"),
            *([Row("best_step", self.trainer.best[0], "steps")] if self.trainer.best else []),
            Row("corpus_audio", tokens["audio_s"], "s"),
        ]

    def _curve_rows(self) -> list[Row]:
        rows = []
        for metric, step, value in self.trainer.curve:
            name, *parts = metric.split("/")
            params: dict[str, Any] = {"step": step}
            for part in parts:
                if part in WEIGHTS:
                    params["weights"] = part
                elif part.startswith(LAYER):
                    params["layer"] = int(part.removeprefix(LAYER))
                else:
                    params["group"] = part
            rows.append(Row(name, value, "", params))
        spikes = self.trainer.spikes
        return rows + [Row("grad_spikes", n, "steps", {"group": group}) for group, n in spikes.items()]

    def _score_rows(self, scores: CodebookScores, weights: str) -> list[Row]:
        at = {"weights": weights}
        rows = [
            *nll_rows(scores, "final_val_nll", at),
            Row("final_val_loss_smoothed", scores.val_loss_smoothed(), "nats a token", at),
            Row("perplexity", scores.perplexity(), "a token", at),
            Row("bits_per_second", scores.bits_per_second(self.source.codec.frame_rate_hz), "bit/s", at),
        ]
        for record in scores.table().to_dict("records"):
            place = at | {"codebook": int(record["codebook"])}
            rows += [Row(f"codebook_{name}", record[name], "", place) for name in ("nll", "top1", "top5")]
        return rows

    def _checkpoint(self, best: CodecLM | None, file: Path) -> Path:
        """Write the published weights: raw and averaged ones of the last step, averaged ones of the best measurement.

        The latter are left out where the last measurement was the best.
        """
        state: dict[str, Any] = {"raw": self.trainer.model.state_dict(), "ema": self.trainer.ema.state_dict()}
        if best is not None and self.trainer.best is not None:
            state |= {"best": best.state_dict(), "best_step": self.trainer.best[0]}
        facts = checkpoint_facts(self.cell, self.source.codec)
        with open(file, "wb") as sink:
            torch.save({"config": json.dumps(config_facts(self.config)), **facts, **state}, sink)
        return file

    def _tokens(self) -> dict[str, object]:
        manifest = self.source.tokens.manifest
        wanted = (
            "dataset",
            "codec",
            "chunk_s",
            "min_s",
            "n_recordings",
            "n_clips",
            "n_frames",
            "n_tokens",
            "audio_s",
            "odd",
        )
        train_clips = len(self.stream.clips)
        rates = {str(rate): files for rate, files in self.source.source_rates.items()}
        counts = {"train_clips": train_clips, "held_out_clips": len(self.held_out), "source_rates": rates}
        texts = {"left_out": self.left_out} if self.study.text else {}
        content = {"content": self.source.content} if self.source.content else {}
        return {n: manifest[n] for n in wanted} | counts | texts | content
