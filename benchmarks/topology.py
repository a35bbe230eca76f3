"""The topology audit's engine against the published pipeline, and each of its parts against its peer.

Peers: ripser.py for H1; scikit-learn's pairwise distances; dense NumPy products for Tanimoto; the published null
samplers, among them the Python swap loop on sets. A route is one run of the study: rows drawn, distances, (landmarks,)
H1, then the same for every null of the representation. CPU-seconds, paired; compilation is done before.

    python benchmarks/topology.py [--only h1,nulls,distances,routes,processes,growth] [--quick] [--full]
                                  [--table curated.csv] [--repeats 3] [--out FILE]

--full adds H1 at n = 4,000, where ripser needs minutes per matrix. --quick shrinks everything to a smoke test whose
ratios mean nothing. Without --table the data are synthetic stand-ins, and the report states it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray
from ripser import ripser
from sklearn.metrics import pairwise_distances

from analysis.topology import distances, nulls
from analysis.topology.persistence import h1, landmarks
from benchmarks._paired import Paired, machine, markdown_table, paired, timed, write_report

PEER, OURS = "published", "plumbline"
PARTS = ("distances", "nulls", "h1", "routes", "processes", "growth")
METRIC = {"bits": "jaccard", "counts": "tanimoto", "physchem": "euclidean", "gaussian": "euclidean"}
NULLS = {
    "bits": ("fixed_margin", "bernoulli", "permute_columns"),
    "counts": ("multinomial", "permute_columns"),
    "physchem": ("permute_columns", "gaussian"),
}
H1_TARGET = {(kind, n): 30.0 for kind in METRIC for n in (1000, 2000)} | {
    ("bits", 4000): 60.0,
    ("gaussian", 4000): 30.0,
}
ROUTE_TARGET = {("bits", "direct"): 75.0, ("bits", "landmark"): 120.0, ("counts", "direct"): 12.0}

Results = dict[str, dict[str, Paired]]
Targets = dict[tuple[str, str], float]


# --- the published pipeline, written out plainly ----------------------------------------------------------------


def published_distance(x: NDArray, metric: str) -> NDArray:
    if metric != "tanimoto":
        return pairwise_distances(x, metric=metric)
    dense = x.astype(np.float64)
    inner = dense @ dense.T
    norm = np.diag(inner)
    denominator = norm[:, None] + norm[None, :] - inner
    d = 1 - np.divide(inner, denominator, out=np.ones_like(inner), where=denominator > 0)
    np.fill_diagonal(d, 0)
    return d


def published_h1(d: NDArray) -> NDArray:
    return ripser(d, distance_matrix=True, maxdim=1)["dgms"][1]


def published_swaps(x: NDArray, seed: int) -> NDArray:
    rng = np.random.default_rng(seed)
    sets = [set(np.flatnonzero(row)) for row in x]
    target = 5 * int(x.sum())
    done = attempts = 0
    while done < target and attempts < 50 * target:
        attempts += 1
        a, b = rng.choice(len(sets), size=2, replace=False)
        only_a = list(sets[a] - sets[b])
        only_b = list(sets[b] - sets[a])
        if not only_a or not only_b:
            continue
        i, j = rng.choice(only_a), rng.choice(only_b)
        sets[a].remove(i)
        sets[a].add(j)
        sets[b].remove(j)
        sets[b].add(i)
        done += 1
    out = np.zeros_like(x)
    for row, ones in enumerate(sets):
        out[row, list(ones)] = True
    return out


def published_null(name: str, x: NDArray, seed: int) -> NDArray:
    return published_swaps(x, seed) if name == "fixed_margin" else getattr(nulls, name)(x, seed, "published")


# --- data -------------------------------------------------------------------------------------------------------


def load(table: str | None, rows: int) -> tuple[dict[str, NDArray], str]:
    """The four data types, at least `rows` rows each, and a sentence that describes them."""
    rng = np.random.default_rng(0)
    if table is not None:
        from data.molecules import curated, morgan, physchem, zscore

        smiles = list(curated(table).smiles)
        data = {
            "bits": morgan(smiles).astype(bool),
            "counts": morgan(smiles, counts=True),
            "physchem": zscore(physchem(smiles)),
        }
        source = f"Morgan bits and counts (radius 4, 2,048) and z-scored physchem of {len(smiles)} molecules"
    else:
        rate = rng.gamma(0.12, 1.0, size=2048)
        counts = rng.poisson(rate * 30 / rate.sum() * rng.gamma(6, 1 / 6, size=(rows, 1)))
        mixing = rng.normal(size=(10, 10))
        data = {"bits": counts > 0, "counts": counts, "physchem": rng.gamma(2, 1, size=(rows, 10)) @ mixing}
        source = "synthetic stand-ins for fingerprints and physchem (no --table given)"
    return data | {"gaussian": rng.normal(size=(rows, 256))}, source


def draw(x: NDArray, n: int, run: int = 0) -> NDArray:
    return x[np.sort(np.random.default_rng(run).choice(len(x), n, replace=False))]


# --- parts ------------------------------------------------------------------------------------------------------


def versus(peer: Callable[[], object], ours: Callable[[], object], repeats: int) -> dict[str, Paired]:
    return paired({PEER: timed(peer), OURS: timed(ours)}, baseline=PEER, repeats=repeats, warmup=0)


def bench_distances(data: Mapping[str, NDArray], sizes: list[int], repeats: int) -> tuple[Results, Targets]:
    results, targets = {}, {}
    for kind, metric in METRIC.items():
        x = draw(data[kind], sizes[0])
        case = f"{metric} of {kind}, n = {len(x)}"
        results[case] = versus(
            partial(published_distance, x, metric),
            partial(distances.distance_matrix, x, metric),
            repeats,
        )
        if metric == "jaccard":
            targets[case, OURS] = 350.0
    return results, targets


def bench_nulls(data: Mapping[str, NDArray], sizes: list[int], repeats: int) -> tuple[Results, Targets]:
    results, targets = {}, {}
    for kind, names in NULLS.items():
        x = draw(data[kind], sizes[0])
        for name in names:
            case = f"{name} of {kind}, n = {len(x)}"
            results[case] = versus(
                partial(published_null, name, x, 1),
                partial(getattr(nulls, name), x, 1),
                repeats,
            )
            if name == "fixed_margin":
                targets[case, OURS] = 300.0
    return results, targets


def bench_h1(
    data: Mapping[str, NDArray], kinds: Sequence[str], sizes: list[int], repeats: int
) -> tuple[Results, Targets]:
    results, targets = {}, {}
    for n in sizes:
        for kind in kinds:
            metric = METRIC[kind]
            d = distances.distance_matrix(draw(data[kind], n), metric)
            case = f"H1 of {kind}, n = {n}"
            ours, peer = h1(d), published_h1(d)
            peer = peer[peer[:, 1] > peer[:, 0]].astype(np.float32)
            if not np.array_equal(ours, peer[np.lexsort((peer[:, 1], peer[:, 0]))]):
                raise AssertionError(f"{case}: pairs differ from ripser's; the ratio would mean nothing")
            results[case] = versus(partial(published_h1, d), partial(h1, d), repeats if n <= 2000 else 1)
            if (goal := H1_TARGET.get((kind, n))) is not None:
                targets[case, OURS] = goal
    return results, targets


def route(x: NDArray, kind: str, name: str, n_landmarks: int, ours: bool) -> list[float]:
    """Largest persistence of one run and of one draw of every null."""
    top = []
    for position, null in enumerate((None, *NULLS[kind])):
        y = x
        if null is not None:
            seed = 10000 * position
            y = getattr(nulls, null)(x, seed) if ours else published_null(null, x, seed)
        d = distances.distance_matrix(y, METRIC[kind]) if ours else published_distance(y, METRIC[kind])
        if name == "landmark":
            chosen = landmarks(d, n_landmarks, 500000 + 1000 * position)
            d = d[np.ix_(chosen, chosen)]
        loops = h1(d) if ours else published_h1(d)
        top.append(float(np.diff(loops, axis=1).max(initial=0)))
    return top


def bench_routes(data: Mapping[str, NDArray], sizes: list[int], repeats: int) -> tuple[Results, Targets]:
    results, targets = {}, {}
    for kind in NULLS:
        for name in ("direct", "landmark"):
            x = draw(data[kind], sizes[0])
            k = sizes[0] // 4
            case = f"route {kind} {name}, n = {len(x)}"
            results[case] = versus(
                partial(route, x, kind, name, k, ours=False),
                partial(route, x, kind, name, k, ours=True),
                repeats,
            )
            if (kind, name) in ROUTE_TARGET:
                targets[case, OURS] = ROUTE_TARGET[kind, name]
    together = {
        arm: [sum(s) for s in zip(*(case[arm].arm_s for case in results.values()), strict=True)] for arm in (PEER, OURS)
    }
    results["all six routes together"] = {
        arm: Paired(name=arm, baseline_s=tuple(together[PEER]), arm_s=tuple(seconds))
        for arm, seconds in together.items()
    }
    targets["all six routes together", OURS] = 40.0
    return results, targets


def _work(x: NDArray, count: int) -> float:
    """CPU-seconds of `count` null draws with H1."""
    begin = time.process_time()
    for seed in range(count):
        h1(distances.jaccard(nulls.bernoulli(x, seed)))
    return time.process_time() - begin


def bench_processes(data: Mapping[str, NDArray], n: int, repeats: int) -> str:
    """Gain of two processes over one on the same null draws: by wall-clock, and by CPU time.

    By CPU time it is total CPU-seconds alone / CPU-seconds of the busier of the two, which is the gain in
    wall-clock time on idle cores: shared caches and memory count, other programs' time slices do not.
    """
    x = draw(data["bits"], n)
    count = 24
    wall, cpu = [], []
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_work, [x, x], [2, 2]))
        for _ in range(repeats):
            start = time.perf_counter()
            cpu_alone = pool.submit(_work, x, count).result()
            alone = time.perf_counter() - start
            start = time.perf_counter()
            cpu_both = list(pool.map(_work, [x, x], [count // 2, count // 2]))
            wall.append(alone / (time.perf_counter() - start))
            cpu.append(cpu_alone / max(cpu_both))

    def told(name: str, ratios: list[float]) -> str:
        ratio = float(np.median(ratios))
        met = "yes" if ratio >= 1.8 else "**no**"
        return f"{name} ×{ratio:.2f} [{min(ratios):.2f}, {max(ratios):.2f}], target ≥ 1.8, met: {met}"

    return (
        f"Two processes compared with one, on the same null draws with H1 (n = {n}): {told('by CPU time', cpu)}; "
        f"{told('by wall-clock', wall)} (other programs took time slices)."
    )


def bench_growth(data: Mapping[str, NDArray], sizes: list[int], repeats: int) -> str:
    """CPU-seconds of our H1 by n, and the slope of the log-log fit."""
    lines = ["| H1 CPU-seconds | " + " | ".join(f"n = {n}" for n in sizes) + " | slope |"]
    lines.append("|---" * (len(sizes) + 2) + "|")
    for kind, metric in METRIC.items():
        seconds = []
        for n in sizes:
            d = distances.distance_matrix(draw(data[kind], n), metric)
            seconds.append(min(timed(partial(h1, d))() for _ in range(repeats)))
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        lines.append(f"| {kind} | " + " | ".join(f"{s:.3f}" for s in seconds) + f" | {slope:.2f} |")
    return "\n".join(lines)


def warm_up(data: Mapping[str, NDArray]) -> None:
    """Compile or load every kernel on inputs of the types to come."""
    for kind, metric in METRIC.items():
        x = draw(data[kind], 40)
        h1(distances.distance_matrix(x, metric))
        for name in NULLS.get(kind, ()):
            getattr(nulls, name)(x, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test, no measurement")
    parser.add_argument("--full", action="store_true", help="H1 at n = 4,000 too (minutes of ripser)")
    parser.add_argument("--table", help="curated odor table (CSV with nonStereoSMILES)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: unknown part; choose from {', '.join(PARTS)}")

    data, source = load(arguments.table, 4983)
    sizes = [120, 240] if arguments.quick else [1000, 2000]
    warm_up(data)
    results: Results = {}
    targets: Targets = {}
    sections = []

    def take(part: tuple[Results, Targets]) -> None:
        results.update(part[0])
        targets.update(part[1])

    if "distances" in parts:
        take(bench_distances(data, sizes, arguments.repeats))
    if "nulls" in parts:
        take(bench_nulls(data, sizes, arguments.repeats))
    if "h1" in parts:
        take(bench_h1(data, list(METRIC), sizes, arguments.repeats))
        if arguments.full:
            take(bench_h1(data, ["bits", "gaussian"], [4000], 1))
    if "routes" in parts:
        take(bench_routes(data, sizes, arguments.repeats))
    if results:
        sections.append(markdown_table(results, baseline=PEER, targets=targets))
    if "growth" in parts:
        grown = [120, 240, 480] if arguments.quick else [500, 1000, 2000, 3000, 4983]
        sections.append(bench_growth(data, grown, arguments.repeats))
    if "processes" in parts:
        sections.append(bench_processes(data, sizes[0], arguments.repeats))
    head = f"# Topology engine\n\n{machine()}\n\nData: {source}.\n"
    if arguments.quick:
        head += "\nQuick run: sizes far below the study's, so the ratios mean nothing.\n"
    write_report(head + "\n" + "\n\n".join(sections), arguments.out)


if __name__ == "__main__":
    main()
