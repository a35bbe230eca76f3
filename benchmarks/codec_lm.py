"""Training and sampling of the 21.9M speech model against the published way: CPU-time ratios and peak memory.

    python benchmarks/codec_lm.py [--repeats 3] [--only training|sampling] [--precision float32|bfloat16] [--quick]
                                  [--out docs/benchmarks/codec_lm.md]

The published way has the same weights and computes the same loss and logits, in another way. Gated DeltaNet goes
token by token through autograd, rows are padded to the context of 1,024 columns, logits are stored whole, the
optimizer and the averaged weights are the library's plain loops, and sampling reads the whole prefix again for every
column. One thread. The arms of a training step run in separate processes, so that neither profits from the
other's memory.

Shapes: B clips, K codebooks, T columns, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._memory import added_peak_mib, in_fresh_process
from benchmarks._paired import Arm, Worker, machine, markdown_table, paired, serve, timed, write_report
from benchmarks._sequence_baselines import gated_delta_scan
from models.codec.delay import training_pair
from models.codec.model import CodecLM
from models.codec.names import build_lm
from models.codec.sampling import generate
from models.cpu.bfloat16 import multiplies_bfloat16
from models.mixers import gated_delta as gated_delta_layers
from sweeps.codec.loop import Batch, TrainConfig, Trainer, autocast

PRESET = "speech_olmo_hybrid_a100_20m_ctx1024"
PUBLISHED, OURS = "published", "ours"
FRAMES = 600  # 8 s of EnCodec at 75 Hz; 607 columns with the delay pattern
CLIPS = 2  # the study's 24 need about 100 GB the published way
SMOOTHING = 0.1
EVERY = 40  # of the prefixes that the published sampler reads, those that are timed
PRECISION = "bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "float32"  # the faster one
CONFIG = TrainConfig(steps=12_000, lr=3e-4, lr_end=1e-5, warmup_steps=500)


def use_published_scan() -> None:
    """From now on this process's Gated DeltaNet layers go token by token."""

    def scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, impl: str) -> tuple[Tensor, None]:
        return gated_delta_scan(q, k, v, g, beta), None

    gated_delta_layers.gated_delta = scan  # type: ignore[assignment]


def clips(model: CodecLM, frames: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, K, T] of random clips of `frames` frames."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    codes_BKT = torch.randint(config.codebook_size, (CLIPS, config.n_codebooks, frames), generator=generator)
    return training_pair(codes_BKT, pad=config.pad, bos=config.bos)


def published_loss(model: CodecLM, inputs_BKT: Tensor, targets_BKT: Tensor) -> Tensor:
    """Smoothed cross-entropy of rows padded as the study's are (to 1,024 columns from 607), from whole logits."""
    config, T = model.config, inputs_BKT.shape[-1]
    padding = (0, round(T * config.context / (FRAMES + config.n_codebooks - 1)) - T)
    inputs, targets = (F.pad(x, padding, value=config.pad) for x in (inputs_BKT, targets_BKT))
    logits_BTKV = model(inputs)
    return F.cross_entropy(
        logits_BTKV.flatten(0, 2),
        targets.transpose(1, 2).flatten(),
        ignore_index=config.pad,
        label_smoothing=SMOOTHING,
    )


def published_step(frames: int, precision: str) -> Callable[[], object]:
    """One training step as published."""
    use_published_scan()
    model = build_lm(PRESET)
    inputs, targets = clips(model, frames)
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONFIG.lr, betas=CONFIG.betas, weight_decay=0.01)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step() -> None:
        optimizer.zero_grad()
        with autocast(torch.device("cpu"), precision):
            loss = published_loss(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].mul_(CONFIG.ema_decay).add_(p, alpha=1 - CONFIG.ema_decay)

    return step


def our_step(frames: int, precision: str) -> Callable[[], object]:
    """One training step of the product's own trainer on trimmed rows."""
    trainer = Trainer(build_lm(PRESET), replace(CONFIG, precision=precision))
    inputs, targets = clips(trainer.model, frames)
    batch = Batch(inputs, targets, int((targets != trainer.model.config.pad).sum()))
    return lambda: trainer.step(batch)


STEPS = {PUBLISHED: published_step, OURS: our_step}


def check_agreement() -> None:
    """Raise AssertionError unless both ways give the same loss in float32."""
    model = build_lm(PRESET)
    inputs, targets = clips(model, 40)
    ours = model.loss(inputs, targets, label_smoothing=SMOOTHING).loss.item()
    kept = gated_delta_layers.gated_delta
    try:
        use_published_scan()
        published = published_loss(model, inputs, targets).item()
    finally:
        gated_delta_layers.gated_delta = kept
    if abs(published - ours) > 1e-4 * ours:
        raise AssertionError(f"the published way has loss {published}, ours {ours}; they must compute the same")


def training(repeats: int, frames: int, precision: str) -> str:
    """Table of a training step, and of its peak memory."""
    check_agreement()
    case = f"training step, {CLIPS} clips of {frames + 7} columns, {precision}"
    argv = [__file__, "--frames", str(frames), "--precision", precision]
    with Worker([*argv, "--serve", PUBLISHED]) as theirs, Worker([*argv, "--serve", OURS]) as own:
        result = paired({PUBLISHED: theirs, OURS: own}, baseline=PUBLISHED, repeats=repeats)
    table = markdown_table({case: result}, baseline=PUBLISHED, targets={(case, OURS): 9.0})
    peaks = {arm: in_fresh_process([*argv, "--peak", arm]) for arm in STEPS}
    ratio = peaks[PUBLISHED] / peaks[OURS]
    met = "yes" if ratio >= 8 else "**no**"
    lines = [
        "Peak: what one step adds to a process that holds weights, moments and averaged weights.",
        "",
        "| case | arm | peak MiB | ratio to ours | target | met |",
        "|---|---|---|---|---|---|",
        f"| {case} | {PUBLISHED} | {peaks[PUBLISHED]:.0f} | {ratio:.2f} | ≥ 8 | {met} |",
        f"| {case} | {OURS} | {peaks[OURS]:.0f} | 1 |  |  |",
    ]
    return table + "\n\n" + "\n".join(lines)


def published_sampler(model: CodecLM, columns: int) -> Arm:
    """CPU-seconds of one sequence whose every column reads the whole prefix again.

    Every `EVERY`-th prefix is timed; the cost of the others is read off the straight line through the timed ones.
    """
    tokens = torch.randint(model.config.codebook_size, (1, model.config.n_codebooks, columns))

    def arm() -> float:
        lengths = list(range(1, columns + 1, EVERY))
        if lengths[-1] != columns:
            lengths.append(columns)
        seconds = []
        for length in lengths:
            start = time.process_time()
            with torch.inference_mode():
                logits = model(tokens[..., :length])[:, -1]
                torch.multinomial(logits.float().softmax(-1).flatten(0, 1), 1)
            seconds.append(time.process_time() - start)
        slope, base = np.polyfit(lengths, seconds, 1)
        return float(sum(base + slope * length for length in range(1, columns + 1)))

    return arm


def sampling(repeats: int, frames: int) -> str:
    """Tables of CPU-seconds per sequence, in float32 and as the study computes, in bfloat16."""
    parts = []
    for precision in ("float32", "bfloat16"):
        with autocast(torch.device("cpu"), precision):
            parts.append(_sampling(repeats, frames, precision))
    note = (
        f"Of the {frames + 7} prefixes every {EVERY}th is timed and a line drawn through their times. Kernels are "
        "compiled or loaded before the first round; a round's own preparation of the weights counts."
    )
    return "\n\n".join([*parts, note])


def _sampling(repeats: int, frames: int, precision: str) -> str:
    kept = gated_delta_layers.gated_delta
    model = build_lm(PRESET).eval()

    def theirs() -> float:
        try:
            use_published_scan()
            return published_sampler(model, frames + 7)()
        finally:
            gated_delta_layers.gated_delta = kept

    def own(batch: int) -> float:
        with torch.inference_mode():
            return timed(partial(generate, model, frames, batch=batch))() / batch

    with torch.inference_mode():
        backend = generate(model, 2).backend
    case = f"sampling {frames} frames, {precision}, CPU-seconds per sequence"
    one, eight = f"ours ({backend}), B = 1", f"ours ({backend}), B = 8"
    arms: dict[str, Arm] = {
        "prefix read again, B = 1": theirs,
        one: partial(own, 1),
        eight: partial(own, 8),
    }
    result = paired(arms, baseline="prefix read again, B = 1", repeats=repeats, warmup=0)
    targets = {(case, one): 45.0, (case, eight): 250.0}
    return markdown_table({case: result}, baseline="prefix read again, B = 1", targets=targets)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("training", "sampling"))
    parser.add_argument("--quick", action="store_true", help="one round on short clips, to see that it works")
    parser.add_argument("--frames", type=int, default=FRAMES, help="frames of a clip (600: 8 s of EnCodec)")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default=PRECISION,
        help="of the training step, both arms; default: the faster one here",
    )
    parser.add_argument("--out", type=Path, help="Markdown file to write besides printing")
    parser.add_argument("--serve", choices=tuple(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=tuple(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    frames = 24 if args.quick else args.frames
    if args.serve:
        serve(STEPS[args.serve](frames, args.precision))
        return
    if args.peak:
        step = STEPS[args.peak](frames, args.precision)
        print(added_peak_mib(step, step))
        return
    repeats = 1 if args.quick else args.repeats
    parts = {
        "training": partial(training, repeats, frames, args.precision),
        "sampling": partial(sampling, repeats, frames),
    }
    tables = [part() for name, part in parts.items() if args.only in (None, name)]
    write_report("\n\n".join([f"# Codec language model: {PRESET}", machine(), *tables]), args.out)


if __name__ == "__main__":
    main()
