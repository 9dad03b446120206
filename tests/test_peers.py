"""The race with the peers, without running one: its work, its rule of load, its table."""

import importlib
import json
import sys
from argparse import Namespace
from typing import Any

import jax
import numpy as np
import pytest
from sources import ROOT

from infalign_jax.lm import transformer
from infalign_jax.lm.transformer import TransformerConfig

sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))
load, peers, work = map(importlib.import_module, ("load", "peers", "racers.work"))

STAT = "cpu  100 20 30 400 50 6 7 80 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
OPTIONS = Namespace(rounds=3, load_check=True, settings={}, work={}, venvs=ROOT)


def answer(*seconds: float) -> dict[str, Any]:
    given = {"parameters": 1000, "tokens": 60, "versions": {"x": "1.0"}, "settings": "plain"}
    return given | {"seconds": list(seconds)}


@pytest.mark.parametrize("name", peers.RACES)
def test_the_work_has_the_parameters_of_our_model(name: str) -> None:
    given = peers.RACES[name].work
    names = ("width", "layers", "heads", "kv_heads", "mlp_width")
    sizes = {name: getattr(given, name) for name in names}
    config = TransformerConfig(vocab_size=given.vocab, **sizes)
    params = jax.eval_shape(lambda: transformer.initial_params(config, jax.random.key(0)))
    assert given.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_rows_are_of_the_sizes_they_are_named_for() -> None:
    sizes = {name: race.work.parameters / 1e6 for name, race in peers.RACES.items()}
    named = {"1m": 1.25, "5m": 5.25, "125m": 128.4}
    for name, size in sizes.items():
        of = next(part for part in name.split("-") if part in named)
        assert size == pytest.approx(named[of], rel=0.02), name


def test_prompts_are_the_same_for_all_and_others_at_each_step() -> None:
    given = work.Work("grpo", prompt=5, prompts=3, vocab=9)
    first, again, second = (work.prompt_tokens(given, step) for step in (0, 0, 1))
    assert first.shape == (3, 5)
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    assert {3, 8} <= set(np.ravel([work.prompt_tokens(given, step) for step in range(20)]))
    assert first.min() >= work.RESERVED


def test_a_text_is_its_tokens() -> None:
    every = list(range(2048))
    assert work.ids(work.text(every)) == every
    assert len(set(work.text(every))) == 2048


def test_the_cheap_reward_counts_even_tokens() -> None:
    assert work.even_share([[0, 1, 2, 4], [1, 3, 5, 6]]) == [0.75, 0.25]


def test_a_racer_reports_the_steps_after_warm_up(capsys: pytest.CaptureFixture[str]) -> None:
    given = work.Work("grpo", warm_up=1, updates=2)
    work.report(given, [0, 7, 9, 12], given.parameters, {}, "")
    reported = json.loads(capsys.readouterr().out)
    assert reported["seconds"] == [2, 3]
    assert reported["tokens"] == 8 * 8 * 64


def test_a_racer_of_another_size_or_length_is_refused() -> None:
    given = work.Work("grpo", warm_up=1, updates=2)
    with pytest.raises(SystemExit, match=r"expected a model of 1246592 parameters, got 1121932"):
        work.report(given, [0, 7, 9, 12], int(0.9 * given.parameters), {}, "")
    with pytest.raises(SystemExit, match="expected 2 measured steps, got 1"):
        work.report(given, [0, 7, 9], given.parameters, {}, "")


def test_what_others_worked_is_what_is_left() -> None:
    ticks = peers.os.sysconf("SC_CLK_TCK")
    assert load.worked(STAT) == ((100 + 20 + 30 + 6 + 7 + 80) / ticks, (400 + 50) / ticks)
    assert load.by_others(all_of_it=21.0, ours=20.0, seconds=10.0) == pytest.approx(0.1)
    assert load.by_others(all_of_it=19.0, ours=20.0, seconds=10.0) == 0


@pytest.mark.parametrize(("others", "loaded"), [(0.04, False), (0.06, True)])
def test_a_twentieth_of_a_core_is_too_much(others: float, loaded: bool) -> None:
    assert load.too_loaded(others, checked=True) is loaded
    assert load.too_loaded(others, checked=False) is False


def test_a_machine_that_does_not_become_idle_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 10_000, 300))
    monkeypatch.setattr(load.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(load.time, "sleep", lambda seconds: None)
    seen = iter([(0.0, 0.0), (1.0, 1.0)] * 9)
    monkeypatch.setattr(load, "now", lambda: next(seen))
    with pytest.raises(SystemExit, match="expected it 95% idle, got 50% after 600 s"):
        load.wait_until_idle()
    seen = iter([(0.0, 0.0), (0.04, 0.96)])
    load.wait_until_idle()


def test_a_loaded_round_is_run_again_and_the_order_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    # 1: fine; 2: loaded at its second process; again: loaded at its first; again: fine; 3: fine.
    others = iter([0.0, 0.01, 0.0, 0.9, 0.2, 0.0, 0.0, 0.0, 0.0])

    def ask(python: str, racer: str, given: Any) -> tuple[dict[str, Any], float]:
        asked.append(racer)
        return answer(float(len(asked))), next(others)

    monkeypatch.setattr(peers, "ask", ask)
    monkeypatch.setattr(load, "wait_until_idle", lambda: None)
    rounds, thrown = peers.run(OPTIONS, peers.RACES["sample-1m-k8"])
    assert asked == ["our", "hf", "hf", "our", "hf", "hf", "our", "our", "hf"]
    assert thrown == 2
    of_rounds = [(found["ours"]["seconds"], found["peer"]["seconds"]) for found in rounds]
    assert of_rounds == [([1.0], [2.0]), ([7.0], [6.0]), ([8.0], [9.0])]
    others = iter([1.0] * 99)
    with pytest.raises(SystemExit, match="21 thrown away in a row"):
        peers.run(OPTIONS, peers.RACES["sample-1m-k8"])


def rounds() -> list[dict[str, Any]]:
    """Ratios 4, 1.5 and 2; the ratio of the medians, 8/2, would be another."""
    ours, theirs = ((1, 2, 9), (2, 2, 2), (4, 4, 4)), ((8, 8, 8), (1, 3, 4), (8, 8, 8))
    return [{"ours": answer(*a), "peer": answer(*b)} for a, b in zip(ours, theirs, strict=True)]


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    found = peers.summary(rounds())
    assert found["ours"]["rounds"] == [2, 2, 4]
    assert found["peer"]["rounds"] == [8, 3, 8]
    assert found["ratios"] == [4, 1.5, 2]
    assert (found["least"], found["ratio"], found["most"]) == (1.5, 2, 4)
    assert found["peer"]["seconds"] == 8
    assert found["peer"]["tokens_per_second"] == 60 / 8


def test_the_table_says_what_ran_and_what_did_not() -> None:
    row = {"name": "a", "against": "TRL GRPO", "work": peers.described(work.Work("grpo"))}
    checked = row | peers.summary(rounds()) | {"thrown_away": 3, "load_checked": True}
    unchecked = checked | {"name": "b", "load_checked": False}
    skipped = row | {"name": "c", "skipped": "skipped: no environment trl"}
    text = peers.markdown([checked, unchecked, skipped], "a machine")
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len({len(cells) for cells in table}) == 1
    a, b, c = ([cell.strip() for cell in cells] for cells in table[2:])
    work_told = "RL step, reward model, 1.25M, P=64, T=64, 8 × 8"
    assert a[:5] == ["a", "TRL GRPO", work_told, "8.000", "2.000"]
    assert a[5:] == ["**2.00** (1.50 to 4.00)", "8", "30", "3", "3"]
    assert b[-1] == "LOAD NOT CHECKED"
    assert c[3] == "skipped: no environment trl"
    assert "- a, b: ours: x 1.0; 1,000 parameters; plain" in text
