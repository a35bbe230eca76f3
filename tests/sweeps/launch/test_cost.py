"""`--plan`: what is left and what was spent, in hours and money."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sweeps.core.cells import Estimate, Row, UserError
from sweeps.core.gpus import GPU_TYPES, asked_types
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.cost import BYTES_SHARE, FLOPS_SHARE, cost_lines, gpu_hours, spent_hours, unit_of
from sweeps.ledger.ledger import Ledger

ONE = Machine(nodes=1, cpus=8, gpus=0, memory_bytes=2**34, hardware="x")
EIGHT = Machine(nodes=2, cpus=64, gpus=8, memory_bytes=2**34, hardware="x")


def test_an_attempt_is_paid_once_until_its_last_cell_by_its_share() -> None:
    work = [("a", 1800.0, 0.5, "cpu"), ("a", 3600.0, 0.5, "cpu"), ("b", 7200.0, 0.25, "cpu"), ("c", 60.0, 2.0, "cuda")]
    work += [("d", math.nan, 1.0, "cpu"), ("e", 60.0, 1.0, "")]
    assert spent_hours(work) == ({"GPU": (1 / 30, 1), "machine": (1.0, 2)}, 2)
    assert spent_hours(reversed(work)) == spent_hours(work)
    assert spent_hours([]) == ({}, 0)


def test_gpu_hours_are_the_roofline_of_the_datasheet() -> None:
    kind = GPU_TYPES["h100-sxm"]
    arithmetic = Estimate(flops=kind.bf16_tflops * 1e12 * FLOPS_SHARE * 3600)
    assert gpu_hours(arithmetic, kind) == pytest.approx(1.0)
    traffic = Estimate(flops=1.0, bytes=kind.memory_tb_s * 1e12 * BYTES_SHARE * 7200)
    assert gpu_hours(traffic, kind) == pytest.approx(2.0)
    both = Estimate(flops=arithmetic.flops, bytes=traffic.bytes)
    assert gpu_hours(both, kind) == pytest.approx(2.0)
    assert gpu_hours(traffic, GPU_TYPES["h200-sxm"]) == pytest.approx(2.0 * 3.35 / 4.8)


def test_gpu_types_are_ordered_as_the_hardware_is() -> None:
    for slow, fast in (
        ("l4", "a10"),
        ("a100-40gb", "a100-80gb-sxm"),
        ("a100-80gb-sxm", "h100-sxm"),
        ("h100-sxm", "b200"),
    ):
        assert GPU_TYPES[slow].bf16_tflops <= GPU_TYPES[fast].bf16_tflops
        assert GPU_TYPES[slow].memory_tb_s < GPU_TYPES[fast].memory_tb_s
    assert all(t.source and 50 < t.bf16_tflops < 5000 and 0.1 < t.memory_tb_s < 20 for t in GPU_TYPES.values())


def test_price_is_a_gpus_where_there_are_gpus_else_a_machines() -> None:
    assert unit_of(ONE) == ("machine", 1)
    assert unit_of(EIGHT) == ("GPU", 8)
    estimate, run = Estimate(seconds=1800.0), RunSettings(price_per_hour=2.5)
    assert cost_lines(estimate, ONE, run, []) == [
        "cost         0.50 machine hours to finish = 1.25 at 2.5 a machine hour"
    ]
    (line,) = cost_lines(estimate, EIGHT, run, [])
    assert "4.00 GPU hours to finish = 10.00 at 2.5 a GPU hour" in line
    _, spent = cost_lines(estimate, EIGHT, run, [("a", 3600.0, 2.0, "cuda")])
    assert "2.00 GPU hours in 1 packs that published = 5.00 at 2.5 a GPU hour; with what is left 15.00" in spent
    (line,) = cost_lines(estimate, ONE, RunSettings(), [])
    assert line.endswith("hours to finish; --set price_per_hour=PRICE for the money")


def test_hours_of_gpus_are_not_priced_as_hours_of_a_machine_without_them() -> None:
    work = [("a", 3600.0, 2.0, "cuda"), ("b", 3600.0, 1.0, "cpu")]
    _, gpus, machines = cost_lines(Estimate(seconds=1800.0), ONE, RunSettings(price_per_hour=2.5), work)
    assert gpus == (
        "spent        2.00 GPU hours in 1 packs that published; not in the money: the price is of a machine hour"
    )
    assert machines.startswith(
        "spent        1.00 machine hours in 1 packs that published = 2.50 at 2.5 a machine hour; "
    )


def test_work_that_is_not_counted_has_no_price() -> None:
    run = RunSettings(price_per_hour=1.0, gpu=("h100-sxm:3",))
    assert cost_lines(Estimate(seconds=1800.0), ONE, run, [])[1:] == [
        "on h100-sxm       not known: this sweep does not count its arithmetic"
    ]


def test_each_gpu_type_has_its_own_price_and_says_what_is_assumed() -> None:
    run = RunSettings(price_per_hour=1.0, gpu=("h100-sxm:3", "l4"))
    estimate = Estimate(flops=989e12 * FLOPS_SHARE * 3600 * 10, seconds=math.nan)
    h100, l4 = cost_lines(estimate, ONE, run, [])[1:]
    assert "10.00 GPU hours" in h100
    assert "= 30.00 at 3 a GPU hour" in h100
    assert "30% of 989 TFLOP/s" in h100
    assert "not measured" in h100
    assert f"{10 * 989 / 121:.2f} GPU hours" in l4
    assert "at 1 a GPU hour" in l4


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("h100", r"gpu='h100' is not known; did you mean h100-\w+\?; types: a10,"),
        ("l4:cheap", "gpu='l4:cheap' has no number after the colon; write l4:2.5"),
        ("l4:-1", "has a price that is not 0 or more"),
    ],
)
def test_bad_gpu_types_are_one_line(text: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        asked_types([text])


@pytest.mark.parametrize(
    "name", ["checkpoint_seconds", "grace_seconds", "gpu_memory_gb", "mlflow_artifact_mb", "price_per_hour"]
)
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_numbers_that_cannot_be_meant_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{name}={value} is not a finite number of 0 or more"):
        RunSettings(**{name: value})


def test_gpu_types_are_checked_whether_or_not_a_plan_asks() -> None:
    with pytest.raises(UserError, match="gpu='foo' is not known"):
        RunSettings(gpu=("foo",))


def test_plan_shows_what_the_ledger_says_was_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    from toy_sweep import SWEEP, Square

    from sweeps.launch import command

    monkeypatch.setattr(Machine, "here", staticmethod(lambda: ONE))
    ledger = Ledger(str(tmp_path / "runs/ledger"), "toy", "1")
    work = {"launch": "l", "pack": "p", "pack_started_unix": 1.0, "pack_share": 0.5, "device": "cpu"}
    for n, seconds in ((1, 3600.0), (2, 7200.0)):
        ledger.publish(Square(n=n), [Row("square", n * n)], {}, {**work, "pack_seconds": seconds, "fingerprint": "f"})
    arguments = ["--plan", "--set", "n=1,2,3", "--set", "seconds=3600", "--set", "price_per_hour=2"]
    assert command.main(SWEEP, arguments) == 0
    out = capsys.readouterr().out
    assert "cost         1.00 machine hours to finish = 2.00" in out
    assert "spent        1.00 machine hours in 1 packs that published = 2.00" in out
    assert "with what is left 4.00" in out
    assert "LM passes" not in out
    ledger.done()
    ledger.compact([Square(n=n).key for n in (1, 2)])
    assert command.main(SWEEP, arguments) == 0
    assert "spent        1.00 machine hours in 1 packs" in capsys.readouterr().out
