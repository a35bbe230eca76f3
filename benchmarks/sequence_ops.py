"""Sequence operators against their published formulations: CPU-time ratios and peak memory, one thread.

    python benchmarks/sequence_ops.py [--repeats 5] [--only NAME ...] [--out docs/benchmarks/sequence_ops.md]

Every arm computes outputs and all gradients in float32; before timing, their results are compared. Peak memory is
what one forward and backward pass adds to a fresh process.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _sequence_baselines as published
from benchmarks._memory import added_peak_mib, in_fresh_process
from benchmarks._paired import machine, markdown_table, paired, timed, write_report
from models.ops import (
    elu_feature_map,
    gated_delta,
    linear_attention_segments,
    memory_cache_retrieval,
    segment_gate_logits,
    selective_scan,
    short_conv,
    ssd,
)

OURS = "ours"
QUICK_GIB = 4.0
Operator = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Operators that compute the same from the same inputs, the first of them the baseline.

    `least_ratio` and `least_memory_ratio` map an arm to what ours must at least save against it, in time and in
    peak memory. `needs_gib` is the memory of the largest arm.
    """

    name: str
    inputs: Callable[[], list[Tensor]]
    arms: dict[str, Operator]
    least_ratio: dict[str, float]
    least_memory_ratio: dict[str, float]
    needs_gib: float = 3.0
    tolerance: float = 1e-4


def _randn(seed: int) -> Callable[..., Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=gen)


def _gated_delta_inputs(T: int, B: int = 4, H: int = 6, K: int = 48, V: int = 96) -> list[Tensor]:
    randn = _randn(0)
    q, k = (F.normalize(randn(B, T, H, K), dim=-1) for _ in range(2))
    rate = 16 * torch.rand(H, generator=torch.Generator().manual_seed(1))
    g = -rate * F.softplus(randn(B, T, H) - 4)
    return [q, k, randn(B, T, H, V), g, 2 * torch.sigmoid(randn(B, T, H))]


def _hugging_face(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    # the public name silently calls flash-linear-attention where that is installed
    return torch_chunk_gated_delta_rule.__wrapped__(q, k, v, g, beta)[0]


def _gated_delta(T: int, ratio: float, hf_ratio: float, needs_gib: float) -> Benchmark:
    return Benchmark(
        name=f"gated delta rule B4 T{T} H6 K48 V96",
        inputs=lambda: _gated_delta_inputs(T),
        arms={
            "per-step scan": published.gated_delta_scan,
            "Hugging Face chunked": _hugging_face,
            OURS: lambda *x: gated_delta(*x, impl="chunked")[0],
        },
        least_ratio={"per-step scan": ratio, "Hugging Face chunked": hf_ratio},
        least_memory_ratio={"per-step scan": 25.0, "Hugging Face chunked": 2.0},
        needs_gib=needs_gib,
    )


SEGMENT = 128


def _memory_cache_inputs(B: int = 2, T: int = 1024, H: int = 8, K: int = 64) -> list[Tensor]:
    randn = _randn(0)
    q, k = (elu_feature_map(randn(B, T, H, K)) for _ in range(2))
    x, u = randn(B, T, H * K), randn(B, T, H * K) / (H * K) ** 0.5
    return [q, k, randn(B, T, H, K), x, u]


def _published_memory_cache(q: Tensor, k: Tensor, v: Tensor, x: Tensor, u: Tensor) -> Tensor:
    gates = torch.softmax(published.segment_gate_logits(u, x, SEGMENT), -1)
    o, states = published.chunked_linear_attention(q, k, v, SEGMENT)
    return gates[..., -1:, None] * o + published.memory_cache_reads(q, states, gates[..., :-1])


def _our_memory_cache(q: Tensor, k: Tensor, v: Tensor, x: Tensor, u: Tensor) -> Tensor:
    gates = torch.softmax(segment_gate_logits(u, x, segment=SEGMENT), -1)
    o, _, (states, _) = linear_attention_segments(q, k, v, segment=SEGMENT)
    h = memory_cache_retrieval(q, states, gates[..., :-1], segment=SEGMENT)
    return torch.addcmul(h, gates[..., -1:, None], o)


def _mamba1_inputs(B: int = 1, T: int = 256, D: int = 768, N: int = 64) -> list[Tensor]:
    randn = _randn(0)
    A = -torch.arange(1.0, N + 1).expand(D, N).clone()
    return [randn(B, T, D), F.softplus(randn(B, T, D) - 3), A, randn(B, T, N), randn(B, T, N)]


def _mamba2_inputs(B: int = 2, T: int = 1024, H: int = 12, P: int = 64, N: int = 64) -> list[Tensor]:
    randn = _randn(0)
    A = -torch.arange(1.0, H + 1)
    return [randn(B, T, H, P), F.softplus(randn(B, T, H) - 3), A, randn(B, T, H, N), randn(B, T, H, N)]


def _conv1d(x: Tensor, weight: Tensor) -> Tensor:
    W = weight.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), groups=x.shape[2], padding=W - 1)
    return F.silu(y[..., : x.shape[1]].transpose(1, 2))


BENCHMARKS = (
    _gated_delta(1024, 18.0, 1.4, needs_gib=4.0),
    _gated_delta(4096, 50.0, 2.0, needs_gib=12.0),
    Benchmark(
        name=f"memory-cached linear attention B2 T1024 H8 K64 segment {SEGMENT}",
        inputs=_memory_cache_inputs,
        arms={"[B, T, L, H, V] reads": _published_memory_cache, OURS: _our_memory_cache},
        least_ratio={"[B, T, L, H, V] reads": 1.7},
        least_memory_ratio={"[B, T, L, H, V] reads": 1.8},
    ),
    Benchmark(
        name="Mamba-1 selective scan B1 T256 D768 N64",
        inputs=_mamba1_inputs,
        arms={
            "published reference": published.selective_scan_loop,
            OURS: lambda *x: selective_scan(*x)[0],
        },
        least_ratio={"published reference": 50.0},
        least_memory_ratio={},
    ),
    Benchmark(
        name="Mamba-2 SSD B2 T1024 H12 P64 N64",
        inputs=_mamba2_inputs,
        arms={
            "per-step scan": published.ssd_scan,
            "paper's listing": lambda x, dt, A, B, C: published.ssd_listing(x, dt, A, B, C, 64),
            OURS: lambda *x: ssd(*x)[0],
        },
        least_ratio={"per-step scan": 2.5},
        least_memory_ratio={},
    ),
    Benchmark(
        name="short convolution B4 T1024 D1152 W4",
        inputs=lambda: [_randn(0)(4, 1024, 1152), _randn(1)(1152, 4)],
        arms={"torch conv1d + SiLU": _conv1d, OURS: lambda x, w: short_conv(x, w)[0]},
        least_ratio={},
        least_memory_ratio={},
    ),
)


def forward_and_backward(operator: Operator, inputs: list[Tensor]) -> list[Tensor]:
    """Output and the gradients of all inputs for a fixed random weighting of the output."""
    leaves = [x.requires_grad_() for x in inputs]
    y = operator(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, _loss_weights(y.shape))]


@functools.lru_cache(maxsize=1)
def _loss_weights(shape: torch.Size) -> Tensor:
    """Drawn once, so that no arm's time includes it."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def check_agreement(benchmark: Benchmark) -> None:
    """Raise AssertionError unless all arms give the same outputs and gradients."""
    inputs = benchmark.inputs()
    expected = forward_and_backward(benchmark.arms[OURS], inputs)
    for name, operator in benchmark.arms.items():
        for actual, ours in zip(forward_and_backward(operator, inputs), expected, strict=True):
            error = ((actual - ours).abs().max() / ours.abs().max()).item()
            if not error <= benchmark.tolerance:
                raise AssertionError(f"{benchmark.name}: {name} differs from ours by {error:.1e} of the largest value")


def measure_peak(benchmark: Benchmark, arm: str) -> float:
    """MiB that one forward and backward pass adds to this process at its peak."""
    inputs = benchmark.inputs()
    small = [x[:, :128] if x.dim() > 2 else x for x in inputs]
    operator = benchmark.arms[arm]
    return added_peak_mib(
        lambda: forward_and_backward(operator, [x.detach().clone() for x in small]),
        lambda: forward_and_backward(operator, inputs),
    )


def result_mib(benchmark: Benchmark) -> float:
    """MiB of what every arm has to hold: output, weights of the loss (as large) and the gradients of all inputs."""
    inputs = benchmark.inputs()
    output = benchmark.arms[OURS](*inputs)
    return sum(x.numel() * x.element_size() for x in [output, output, *inputs]) / 2**20


def _met(ratio: float, target: float) -> str:
    return "yes" if ratio >= target else "**no**"


def memory_rows(benchmark: Benchmark) -> Iterator[str]:
    """Rows of the memory table."""
    results = result_mib(benchmark)
    peaks = {arm: in_fresh_process([__file__, "--peak", benchmark.name, arm]) for arm in benchmark.arms}
    for arm, peak in peaks.items():
        total, working = peak / peaks[OURS], (peak - results) / max(peaks[OURS] - results, 1.0)
        target = benchmark.least_memory_ratio.get(arm)
        cells = [f"{peak:.0f}", f"{total:.2f}", f"{max(peak - results, 0):.0f}", f"{working:.2f}"]
        cells += ["", "", ""] if target is None else [f"≥ {target:g}", _met(total, target), _met(working, target)]
        yield f"| {benchmark.name} | {arm} | {' | '.join(cells)} |"


MEMORY_HEAD = """## Memory of one forward and backward pass

Peak: what the pass adds to a fresh process. Working memory: the peak without output, loss weights and gradients, which
every arm has to hold; where ours has less than 1 MiB, ratios are to 1 MiB. Both ratios are compared with the target.

| case | arm | peak MiB | ratio to ours | working MiB | ratio to ours | target | peak met | working met |
|---|---|---|---|---|---|---|---|---|"""


def run(benchmarks: list[Benchmark], repeats: int) -> str:
    """Measure and return the report."""
    memory = [MEMORY_HEAD]
    tables, skipped = [], []
    for benchmark in benchmarks:
        free_gib = psutil.virtual_memory().available / 2**30
        if free_gib < benchmark.needs_gib:
            skipped.append(f"Skipped {benchmark.name}: needs {benchmark.needs_gib:g} GiB, {free_gib:.1f} are free.")
            continue
        check_agreement(benchmark)
        for peer in (arm for arm in benchmark.arms if arm != OURS):
            inputs = benchmark.inputs()
            arms = {
                name: timed(functools.partial(forward_and_backward, benchmark.arms[name], inputs))
                for name in (peer, OURS)
            }
            result = paired(arms, baseline=peer, repeats=repeats)
            wanted = benchmark.least_ratio.get(peer)
            targets = {} if wanted is None else {(benchmark.name, OURS): wanted}
            tables.append(markdown_table({benchmark.name: result}, baseline=peer, targets=targets))
        memory.extend(memory_rows(benchmark))
    parts = ["# Sequence operators: forward and backward, float32, one thread", machine(), *tables]
    return "\n\n".join([*parts, "\n".join(memory), *skipped])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="run the cases whose name contains one of these words")
    parser.add_argument("--quick", action="store_true", help="one round of the cases that need little memory")
    parser.add_argument("--out", type=Path, help="Markdown file to write besides printing")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "ARM"), help="print the peak memory of one arm in MiB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        name, arm = args.peak
        print(measure_peak(next(b for b in BENCHMARKS if b.name == name), arm))
        return
    chosen = [b for b in BENCHMARKS if not args.only or any(word in b.name for word in args.only)]
    if args.quick:
        chosen = [b for b in chosen if b.needs_gib < QUICK_GIB]
    write_report(run(chosen, 1 if args.quick else args.repeats), args.out)


if __name__ == "__main__":
    main()
