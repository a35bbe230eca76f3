"""CPU-seconds of one SAE training step against SAELens' own trainer.

    python benchmarks/sae_step.py --out docs/benchmarks/sae_step.md
    python benchmarks/sae_step.py --kind batchtopk --ks 32 --out docs/benchmarks/sae_step_batchtopk.md

Peer: `SAETrainer.step` of the installed sae_lens with its training class of the kind (forward, AuxK check, backward,
clip, Adam, scheduler), float32, defaults; as installed, and with glibc's allocator set to keep its memory (no mmap, no
trim), which avoids the page faults of its large temporaries. Ours: `SparseTrainer.step`, numba and torch backends,
allocator as installed. Same activations, same sizes, each arm in a process of its own with `--threads` threads,
rounds interleaved; the ratios are of CPU-seconds (user + system).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks._paired import Paired, Worker, machine, markdown_table, paired, rebase, serve, write_report

KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**28),
}
PEER, TUNED, NUMBA, TORCH = "sae_lens", "sae_lens, allocator tuned", "ours, numba", "ours, torch"
ARMS: dict[str, tuple[str, dict[str, str]]] = {
    PEER: ("peer", {}),
    TUNED: ("peer", KEEP_MEMORY),
    NUMBA: ("numba", {}),
    TORCH: ("torch", {}),
}
# (k, peer) -> least ratio wanted of each backend; a pure-torch target is stated against the peer as installed only
TARGETS = {
    (32, PEER): {NUMBA: 18.0, TORCH: 9.0},
    (256, PEER): {NUMBA: 13.0, TORCH: 4.0},
    (32, TUNED): {NUMBA: 12.0},
    (256, TUNED): {NUMBA: 9.0},
}
BATCH_TARGET = {(32, PEER): {NUMBA: 10.0}}  # BatchTopK and Matryoshka
BATCHES = 4


def steps(which: str, sizes: argparse.Namespace) -> Callable[[], object]:
    """A function that takes the next training step of the peer or of one of our backends."""
    import torch

    torch.set_num_threads(sizes.threads)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(sizes.d_in, sizes.d_in, generator=generator) / sizes.d_in**0.5
    batches = [torch.randn(sizes.batch, sizes.d_in, generator=generator) @ mix + 0.3 for _ in range(BATCHES)]
    count = iter(range(10**9))
    window = 0 if sizes.dead else 1000
    from models.sae.model import matryoshka_widths

    widths = matryoshka_widths(sizes.d_sae) if sizes.kind == "matryoshka" else ()
    if which == "peer":
        from sae_lens import saes
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(0)
        stem = {"topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK"}[sizes.kind]
        more = {"matryoshka_widths": list(widths)} if widths else {}
        own = getattr(saes, f"{stem}TrainingSAEConfig")(d_in=sizes.d_in, d_sae=sizes.d_sae, k=sizes.k, **more)
        sae = getattr(saes, f"{stem}TrainingSAE")(own)
        config = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=sizes.batch,
            lr_end=3e-5,
            dead_feature_window=window,
        )
        peer = SAETrainer(config, sae, iter([]))
        return lambda: peer.step(batches[next(count) % BATCHES])

    from models.sae.trainer import SAEConfig, SparseTrainer

    ours = SparseTrainer(
        SAEConfig(
            d_in=sizes.d_in,
            d_sae=sizes.d_sae,
            k=sizes.k,
            seed=0,
            dead_after_steps=window,
            kind=sizes.kind,
            matryoshka_widths=widths,
        ),
        backend="numba" if which == "numba" else "torch",
        n_threads=sizes.threads,
    )
    ours.step(batches[0])  # compiles or loads the kernels
    return lambda: ours.step(batches[next(count) % BATCHES])


def measure(k: int, args: argparse.Namespace) -> dict[str, Paired]:
    """All arms at one k, in turn."""
    with contextlib.ExitStack() as stack:
        arms = {}
        for name, (which, env) in ARMS.items():
            argv = [str(Path(__file__).resolve()), "--serve", which, "--ks", str(k)]
            for option in ("kind", "d_in", "d_sae", "batch", "threads"):
                argv += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
            argv += ["--dead"] if args.dead else []
            arms[name] = stack.enter_context(Worker(argv, env))
        return paired(
            arms,
            baseline=PEER,
            repeats=args.repeats,
            warmup=1,
            progress=lambda line: print(f"k = {k}: {line}", file=sys.stderr, flush=True),
        )


def report(args: argparse.Namespace) -> str:
    """Measure everything and put it into Markdown."""
    from importlib.metadata import version

    results = {k: measure(k, args) for k in args.ks}
    import torch

    torch.set_num_threads(args.threads)
    title = (
        f"{args.kind} SAE training step, d_in {args.d_in}, d_sae {args.d_sae}, batch {args.batch}, "
        f"{args.threads} thread{'s' if args.threads > 1 else ''}, {args.repeats} rounds"
    )
    if args.dead:
        title += ", dead features (AuxK) in play"
    lines = [
        "# sae_step",
        "",
        f"{title}. Peer: sae_lens {version('sae-lens')}, `SAETrainer.step`. Machine: {machine()}.",
        "",
        "Re-run: `python benchmarks/sae_step.py --out docs/benchmarks/sae_step.md`.",
    ]
    full_size = (args.d_in, args.d_sae, args.batch) == (512, 16384, 4096) and not args.dead
    for peer in (PEER, TUNED):
        other = TUNED if peer == PEER else PEER
        cases = {
            f"k = {k}": {name: arm for name, arm in rebase(rounds, peer).items() if name != other}
            for k, rounds in results.items()
        }
        targets = {
            (f"k = {k}", name): least
            for k in args.ks
            for name, least in (TARGETS if args.kind == "topk" else BATCH_TARGET).get((k, peer), {}).items()
            if full_size
        }
        lines += ["", markdown_table(cases, baseline=peer, targets=targets)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["topk", "batchtopk", "matryoshka"], default="topk")
    parser.add_argument("--ks", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dead", action="store_true", help="every feature that misses a batch is dead: AuxK runs")
    parser.add_argument("--quick", action="store_true", help="small, one round, to see that it runs; no targets")
    parser.add_argument("--out", help="also write the Markdown there")
    parser.add_argument("--serve", choices=["peer", "numba", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        args.k = args.ks[0]
        serve(steps(args.serve, args))
        return
    if args.quick:
        args.d_sae, args.batch, args.repeats = 1024, 1024, 1
    write_report(report(args), args.out)


if __name__ == "__main__":
    main()
