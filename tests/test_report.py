"""What the report shows, that it runs nothing, and what it answers to damaged files."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import stored_run

from infalign_jax import (
    report,
    report_data,
    report_page,
    report_plots,
    report_sections,
    report_theory,
)
from infalign_jax.runtime import goodput

PROCEDURES = ("best_of_4", "worst_of_4", "standard")
HOSTILE = "<script>x</script><b onclick='y'>$\\frac${z}$title\"&"


class Tags(HTMLParser):
    """The tags of a page, their attributes, and its text outside folded details."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = stored_run.write(tmp_path_factory.mktemp("run"))
    assert report.draw(out) == out / "report.html"
    return out


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return (run / "report.html").read_text("utf-8")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return stored_run.write(tmp_path)


def change(out: Path, name: str, edit: Callable) -> None:
    value = json.loads((out / name).read_text())
    edit(value)
    (out / name).write_text(json.dumps(value))


def test_each_figure_is_on_the_page_and_beside_it(run: Path, page: str) -> None:
    stems = {path.stem for path in (run / "plots").glob("*.png")}
    assert {f"win-rate-{name}" for name in PROCEDURES} <= stems
    assert {"calibration-before", "calibration-after", "quantiles-4", "scorers"} <= stems
    assert {"sft-loss", "align-reward", "align-length", "align-kl"} <= stems
    assert page.count("<figure") == len(stems)
    for stem in stems:
        assert (run / "plots" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert (run / "plots" / f"{stem}.pdf").read_bytes().startswith(b"%PDF")


def test_goodput_is_told_in_numbers_and_draws_no_curve(copy: Path) -> None:
    assert "Goodput" not in report_sections.document(report_data.read(copy), {})  # an older run

    def add(results: dict) -> None:
        results["goodput"] = {"sft": {"productive": 0.87, "compilation": 4.5}}

    change(copy, "results.json", add)
    rows = (copy / "metrics.jsonl").read_text().splitlines()
    rows[5] = json.dumps(json.loads(rows[5]) | dict.fromkeys(goodput.OF_A_STEP, 7.25))
    (copy / "metrics.jsonl").write_text("\n".join(rows))
    run = report_data.read(copy)
    assert set(report_data.training_lines(run.metrics)["sft"]) == {"loss"}
    text = Tags(report_sections.document(run, {})).text
    assert "87 %" in text
    assert "4.5" in text.partition("seconds lost to compilation")[2]
    assert "7.25" not in text


def test_every_stored_number_is_on_the_page(page: str) -> None:
    text = Tags(page).text
    for policy in stored_run.results()["policies"]:
        for rates in policy["win_rates"].values():
            assert report_page.percent(rates["train"]) in text
            assert report_page.percent(rates["judge"]) in text
        assert policy["name"] in text
    for shown in (
        "0.1312",
        "0.0287",
        "73.1 %",
        "12,000",
        "8,120",
        "305.5",
        "0.10.2",
        "cpu (2 cores)",
    ):
        assert shown in text
    for key, value in report_page.flat(stored_run.results()["configuration"]).items():
        assert key in text
        assert str(value) in text


def test_the_page_stands_alone_and_runs_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    for tag, attributes in Tags(page).tags:
        assert tag not in {"script", "img", "iframe", "object", "embed"}
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_hostile_text_is_shown_and_not_run(copy: Path) -> None:
    def poison(results: dict) -> None:
        results |= {"experiment": HOSTILE, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
        results |= {"configuration": {HOSTILE: HOSTILE}, "seconds": {HOSTILE: 1.0}}
        results["policies"] = [policy] = results["policies"][:1]
        policy |= {"name": HOSTILE, "win_rates": {"standard": policy["win_rates"]["standard"]}}

    def poison_samples(samples: list) -> None:
        samples[0]["prompt"] = samples[0]["policies"][0]["name"] = HOSTILE
        samples[0]["policies"][0]["responses"][0]["text"] = HOSTILE

    change(copy, "results.json", poison)
    change(copy, "samples.json", poison_samples)
    (copy / "metrics.jsonl").write_text(json.dumps({"stage": "a/../b", "step": 0, HOSTILE: 1}))
    page = report.draw(copy).read_text("utf-8")
    tags = Tags(page)
    assert "script" not in {tag for tag, _ in tags.tags}
    assert not [a for _, attributes in tags.tags for a in attributes if a.startswith("on")]
    assert tags.text.count(HOSTILE) > 8
    assert {path.parent for path in copy.rglob("*.png")} == {copy / "plots"}


def test_references_inside_the_page_are_unique_and_resolve(page: str) -> None:
    tags = Tags(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', page))
    assert wanted
    assert wanted <= set(ids)


def test_drawn_again_it_is_the_same(run: Path, page: str) -> None:
    before = {path: path.read_bytes() for path in (run / "plots").iterdir()}
    assert report.draw(run).read_text("utf-8") == page
    assert {path: path.read_bytes() for path in (run / "plots").iterdir()} == before


def test_the_chosen_response_stands_out(copy: Path) -> None:
    def choose(samples: list) -> None:
        del samples[1:]
        for i, response in enumerate(samples[0]["reference"]):
            response |= {"text": f"reference-{i}", "reward": 9.0 if i == 2 else 0.5}
        del samples[0]["policies"][1:]
        for i, response in enumerate(samples[0]["policies"][0]["responses"]):
            response["text"] = f"aligned-{i}"
        samples[0]["policies"][0]["best"] = 1

    change(copy, "samples.json", choose)
    read = report_data.read(copy)
    shown = report_page.samples(read.samples, read.results["policies"])
    apart = re.sub(r"<details>.*?</details>", "", shown)
    assert re.findall(r"(?:reference|aligned)-\d", apart) == ["reference-2", "aligned-1"]
    assert len(set(re.findall(r"(?:reference|aligned)-\d", shown))) == 8


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_win_rates_are_drawn_where_they_were_measured(procedure: str) -> None:
    results = stored_run.results()
    del results["policies"][0]["win_rates"][procedure]
    (axes,) = report_plots.win_rate_plot(results, procedure).axes
    measured = {
        (round(x, 6), round(y, 6))
        for bars in axes.containers
        for x, y in zip(*bars.lines[0].get_data(), strict=True)
    }
    kept = results["policies"][1:]
    assert measured == {(p["kl"], p["win_rates"][procedure]["train"]["mean"]) for p in kept}
    heights = [s[:, 1] for bars in axes.containers for s in bars.lines[2][1].get_segments()]
    np.testing.assert_allclose([np.ptp(h) for h in heights], 2 * 1.96 * 0.004, rtol=1e-3)
    by_label = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(by_label["reference"], [[0, 0.5]])
    assert {"frontier", "identity", "exponential(10)", "optimal(best_of_4)"} <= set(by_label)


@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("transformation", ["identity", "log", "exponential(10)"])
def test_no_line_crosses_the_frontier(transformation: str, procedure: str) -> None:
    kl, win_rate = report_theory.transformation_line(transformation, procedure, 0.6)
    reach, best = report_theory.frontier_line(procedure, 0.6)
    limit = np.interp(np.sqrt(kl), np.sqrt(reach), best)  # nearly straight over the root
    assert kl[0] == 0
    assert kl[-1] == pytest.approx(0.6)
    assert np.all(np.diff(kl) > 0)
    assert np.all(win_rate <= limit + 3e-4)


@pytest.mark.parametrize(
    ("transformation", "win_rate"),
    [("identity", 0.800), ("log", 0.768), ("exponential(10)", 0.872)],
)
def test_lines_pass_through_known_values(transformation: str, win_rate: float) -> None:
    line = report_theory.transformation_line(transformation, "best_of_4", 0.6)
    assert np.interp(0.5, *line) == pytest.approx(win_rate, abs=1.5e-3)
    limit = np.interp(0.5, *report_theory.frontier_line("best_of_4", 0.6))
    assert limit == pytest.approx(0.873, abs=1.5e-3)


def test_a_run_says_which_procedure_leads() -> None:
    results = stored_run.results()
    assert report_data.lead(results) == "best_of_4"
    assert report_data.lead({**results, "procedure": "worst_of_4"}) == "worst_of_4"
    assert report_data.lead({**results, "procedure": "best_of_16"}) == "best_of_4"
    only = {"win_rates": {"worst_of_2": {}}}
    assert report_data.lead({"policies": [only]}) == "worst_of_2"


def test_long_curves_keep_their_mean_and_their_gaps() -> None:
    step, value = report_plots.thin(np.arange(1000.0), np.sin(np.arange(1000.0)), most=100)
    assert len(step) == len(value) == 100
    assert value.mean() == pytest.approx(np.sin(np.arange(1000.0)).mean())
    rows = [{"stage": "sft", "step": i, "loss": v} for i, v in enumerate([1.0, "nan", None, 2.0])]
    step, value = report_data.training_lines(rows)["sft"]["loss"][""]
    np.testing.assert_array_equal(step, [0, 1, 3])
    np.testing.assert_array_equal(value, [1.0, np.nan, 2.0])


def cut(name: str) -> Callable[[Path], None]:
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:-9])


def set_in(name: str, edit: Callable) -> Callable[[Path], None]:
    return lambda out: change(out, name, edit)


DAMAGE: dict[str, Callable[[Path], object]] = {
    **{f"no {name}": (lambda out, name=name: (out / name).unlink())
       for name in ("results.json", "metrics.jsonl", "evaluation.npz", "samples.json")},
    **{f"cut {name}": cut(name)
       for name in ("results.json", "metrics.jsonl", "evaluation.npz", "samples.json")},
    "no kl in results.json": set_in("results.json", lambda r: r["policies"][1].pop("kl")),
    "text as beta in results.json": set_in(
        "results.json", lambda r: r["policies"][0].update(beta="x")),
    "list as results.json": lambda out: (out / "results.json").write_text("[]"),
    "half a rate in results.json": set_in(
        "results.json", lambda r: r["policies"][0]["win_rates"]["standard"]["judge"].pop("mean")),
    "no such procedure in results.json": set_in(
        "results.json", lambda r: r["policies"][0]["win_rates"].update(best_off_4={})),
    "no such transformation in results.json": set_in(
        "results.json", lambda r: r["policies"][0].update(transformation="identify")),
    "a policy more in results.json than evaluation.npz": set_in(
        "results.json", lambda r: r["policies"].append(r["policies"][0])),
    "text in metrics.jsonl": lambda out: (out / "metrics.jsonl").write_text(
        '{"stage": "sft", "step": 0, "loss": "low"}\n'),
    "no stage in metrics.jsonl": lambda out: (out / "metrics.jsonl").write_text('{"step": 0}\n'),
    "objects in evaluation.npz": lambda out: np.savez(
        out / "evaluation.npz", quantiles_before=np.array([{}], object)),
    "rewards for quantiles in evaluation.npz": lambda out: np.savez(
        out / "evaluation.npz",
        **{**np.load(out / "evaluation.npz"), "quantiles_after": np.array([0.5, -3.0])},
    ),
    "no such response in samples.json": set_in(
        "samples.json", lambda s: s[0]["policies"][0].update(best=4)),
    "no reference in samples.json": set_in("samples.json", lambda s: s[0].update(reference=[])),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_answered_in_one_line(copy: Path, damage: str) -> None:
    DAMAGE[damage](copy)
    with pytest.raises(ValueError) as error:
        report.draw(copy)
    message = str(error.value)
    assert "\n" not in message
    assert "expected" in message
    assert "got" in message
    assert damage.split()[-1].rsplit("/")[-1] in message
    assert not (copy / "report.html").exists()
