"""How a step grows, without the measurement: exponents, what is called too fast, the tables."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from sources import ROOT

from infalign_jax.lm import arithmetic
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.lm.sizes import SIZES
from infalign_jax.lm.transformer import TransformerConfig

sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))
growth = importlib.import_module("growth")

SIZES_OF_POINTS = (1, 4, 16, 64)


def point(size: int, seconds: float, percent: float, memory: int = 2**21) -> dict[str, Any]:
    row = {"seconds": seconds, "percent": percent, "memory_bytes": memory, "least_memory": 2**20}
    row |= {"flops": 10 * size, "bytes": 7}
    return {"size": size, "others": 0.02, "phases": dict.fromkeys(growth.PHASES, row)}


def stored(**axes: list[dict[str, Any]]) -> dict[str, Any]:
    found = {
        letter: {"about": f"about {letter}", "points": points, "growth": growth.grown(points)}
        for letter, points in axes.items()
    }
    return {"machine": "a machine", "rounds": 3, "axes": found}


def test_an_exponent_is_the_power_of_the_size() -> None:
    assert growth.exponent([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)
    # Least squares: the last over the first would be 1, the last step 3.
    assert growth.exponent([1, 2, 4, 8], [1, 1, 1, 8]) == pytest.approx(0.9)


def test_growth_compares_all_sizes_and_the_upper_half() -> None:
    told = [float(n) for n in SIZES_OF_POINTS]
    found = growth.growth(SIZES_OF_POINTS, [8.0, 8.0, 16.0, 128.0], told)
    assert (found["foretold"], found["upper_foretold"]) == pytest.approx((1, 1))
    assert found["measured"] == pytest.approx((3 * 4 + 1) / 20)
    assert found["upper_measured"] == pytest.approx(1.5)
    assert found["excess"] == pytest.approx(0.5)
    steady = growth.growth(SIZES_OF_POINTS, [5 * n for n in told], told)
    assert steady["excess"] == pytest.approx(0, abs=1e-9)
    two = growth.growth([1, 4, 16], [1, 2, 8], [1, 1, 1])
    assert two["upper_measured"] == pytest.approx(1), "of the last two of three sizes"


@pytest.mark.parametrize(("excess", "fast"), [(0.09, False), (0.11, True), (-0.5, False)])
def test_a_tenth_above_is_too_fast(excess: float, fast: bool) -> None:
    assert growth.too_fast({"excess": excess}) is fast


def test_time_is_foretold_by_the_ceiling_and_decoding_may_be_noise() -> None:
    time = growth.QUANTITIES["time"]
    row = {"seconds": 0.2, "percent": 25.0}
    assert time.foretold(row) == pytest.approx(0.05)
    assert time.measured(row | {"seconds": 0.0}) > 0


def test_the_verdict_names_what_is_too_fast_and_the_worst_first() -> None:
    slow = [point(n, 0.1 * n, 50) for n in SIZES_OF_POINTS]
    assert growth.verdict(stored(K=slow)["axes"]) == ["- none"]
    fast = [point(n, 0.1 * n, 50 / n**0.3) for n in SIZES_OF_POINTS]
    faster = [point(n, 0.1, 50, memory=2**20 * n) for n in SIZES_OF_POINTS]
    lines = growth.verdict(stored(K=slow, P=fast, T=faster)["axes"])
    assert len(lines) == 2 * len(growth.PHASES)
    assert lines[0] == "- T: memory of whole step, by 1.00"
    assert lines[-1] == "- P: time of decode, by 0.30"


def test_the_tables_say_each_size_and_what_is_above() -> None:
    fast = [point(n, 0.0125 * n, 50 / n**0.25) for n in SIZES_OF_POINTS]
    text = growth.markdown(stored(K=fast))
    assert "a machine; medians of 3 rounds; others used up to 0.02 cores." in text
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in cells] for cells in table]
    time, memory = rows[: len(growth.PHASES) + 2], rows[len(growth.PHASES) + 2 :]
    assert {len(cells) for cells in time} == {12}
    assert {len(cells) for cells in memory} == {10}
    assert time[0][1:5] == ["K = 1", "K = 4", "K = 16", "K = 64"]
    assert time[2][:5] == ["prefill", "12.5 (50)", "50 (35)", "200 (25)", "800 (18)"]
    assert time[2][5:] == ["1.00", "0.75", "1.00", "0.75", "1.00", "0.00", "**0.25**"]
    assert memory[2][1:] == ["2 (2.0)"] * 4 + ["0.00"] * 4 + [""]
    unchecked = stored(K=[p | {"others": None} for p in fast])
    assert "LOAD NOT CHECKED" in growth.markdown(unchecked)


def test_one_size_grows_on_each_axis() -> None:
    sizes = {
        "K": lambda model, shape: shape.responses,
        "P": lambda model, shape: shape.prompt,
        "T": lambda model, shape: shape.response,
        "V": lambda model, shape: model.vocab_size,
        "parameters": lambda model, shape: arithmetic.parameters(model),
    }
    assert sizes.keys() == growth.AXES.keys()
    for letter, axis in growth.AXES.items():
        found = [{name: of(*growth.work(p)) for name, of in sizes.items()} for p in axis.points]
        grow = {name for name in sizes if len({sizes[name] for sizes in found}) > 1}
        assert grow == {letter} | ({"parameters"} if letter == "V" else set())
        assert [sizes[letter] for sizes in found] == sorted(sizes[letter] for sizes in found)
        for changes in axis.points:
            model, _ = growth.work(changes)
            assert model.unroll in (1, model.layers)
    assert 0.3e6 < found[0]["parameters"] < 0.4e6
    assert 15e6 < found[-1]["parameters"] < 17e6


def test_the_least_memory_grows_with_what_a_phase_holds() -> None:
    model, shape = SIZES["1m"].model, Shape(8, 64, 8, 64)
    many = shape._replace(responses=64)
    for phase in growth.PHASES:
        ratio = growth.least_memory(phase, model, many) / growth.least_memory(phase, model, shape)
        assert (ratio == 1) is (phase == "prefill"), phase
        assert ratio < 8
    whole = growth.least_memory(growth.WHOLE, model, shape)
    assert whole == growth.least_memory("update", model, shape)
    score, log_probs = (
        growth.least_memory(phase, model, shape) for phase in ("reward scoring", growth.LOG_PROBS)
    )
    products, logits = (8 * 64 + 8 * 8 * 64) * 2 * 384, 8 * 8 * 64 * 2048
    assert log_probs - score == 4 * (logits - products), "the logits are more than a product"


def test_axes_are_measured_and_kept_one_by_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits, cores = [], iter([0.01, 0.03])

    def run(model: TransformerConfig, shape: Shape, rounds: int) -> dict[str, Any]:
        assert rounds == 7
        row = {"seconds": 1e-3 * shape.responses, "percent": 50.0, "memory_bytes": 2**20}
        cost = arithmetic.forward(model, shape)._asdict()
        phases = dict.fromkeys(growth.PHASES, row | cost)
        about = {"model": {}, "shape": {}, "ceilings": {}, "parameters": 10**6}
        return about | {"phases": phases, "versions": {}}

    monkeypatch.setattr(growth.bench, "run", run)
    monkeypatch.setattr(growth.load, "wait_until_idle", lambda: waits.append(1))
    monkeypatch.setattr(growth.load, "by_others", lambda *given: next(cores))
    tiny = growth.Axis("responses", [{"responses": n} for n in (2, 4)])
    monkeypatch.setattr(growth, "AXES", {"K": tiny})
    options = Namespace(axes=["K", "P"], rounds=7, load_check=True, out=tmp_path)
    with pytest.raises(KeyError, match="P"):  # stopped before the second axis
        growth.measure_all(options)
    assert len(waits) == 2
    found = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))
    assert [p["size"] for p in found["axes"]["K"]["points"]] == [2, 4]
    text = (tmp_path / "growth.md").read_text(encoding="utf-8")
    assert text == growth.markdown(found)
    assert "medians of 7 rounds; others used up to 0.03 cores" in text
    unchecked = Namespace(**vars(options) | {"axes": ["K"], "load_check": False})
    assert "LOAD NOT CHECKED" in growth.measure_all(unchecked)
    assert len(waits) == 2
