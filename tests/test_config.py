"""Experiment files are read, and `--set` is held to the names and types of their fields."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from infalign_jax.config import load, override, to_dict


@dataclass(frozen=True)
class Synthetic:
    pairs: int = 100


@dataclass(frozen=True)
class Real:
    directory: str = "hh"


@dataclass(frozen=True)
class Needy:
    directory: str


@dataclass(frozen=True)
class Model:
    width: int = 64
    heads: int = 4

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"expected heads to divide width, got {self.heads} and {self.width}")


@dataclass(frozen=True)
class Policy:
    transformation: str = "identity"
    beta: float = 0.1


@dataclass(frozen=True)
class Experiment:
    name: str = "toy"
    seed: int = 0
    rate: float = 1e-3
    remat: bool = False
    limit: int | None = None
    note: str | None = None
    rule: Literal["drop", "error"] = "drop"
    model: Model = Model()
    data: Synthetic | Real | Needy = Synthetic()
    transformations: tuple[str, ...] = ("identity",)
    shape: tuple[int, float] = (1, 1.0)
    policies: tuple[Policy, ...] = (Policy(), Policy("log", 0.3))
    derived: int = field(default=3, init=False)


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("name=a b=c", lambda e: e.name == "a b=c"),
        ("seed=7", lambda e: e.seed == 7),
        ("rate=1", lambda e: e.rate == 1.0 and isinstance(e.rate, float)),
        ("rate=3e-4", lambda e: e.rate == 3e-4),
        ("remat=true", lambda e: e.remat is True),
        ("limit=5", lambda e: e.limit == 5),
        ("limit=none", lambda e: e.limit is None),
        ("note=None", lambda e: e.note is None),
        ("note=some", lambda e: e.note == "some"),
        ("rule=error", lambda e: e.rule == "error"),
        ("model.width=32", lambda e: e.model == Model(32, 4)),
        ("data=Real", lambda e: e.data == Real()),
        ("data.pairs=9", lambda e: e.data == Synthetic(9)),
        ("transformations=log", lambda e: e.transformations == ("log",)),
        (
            "transformations=(exponential(10), optimal(mixture(a,b)))",
            lambda e: e.transformations == ("exponential(10)", "optimal(mixture(a,b))"),
        ),
        ("transformations=(a),(b)", lambda e: e.transformations == ("(a)", "(b)")),
        ("transformations=", lambda e: e.transformations == ()),
        ("shape=2,0.5", lambda e: e.shape == (2, 0.5)),
        ("policies.1.beta=0.5", lambda e: e.policies == (Policy(), Policy("log", 0.5))),
    ],
)
def test_a_value_is_read_by_its_field(assignment: str, read: Any) -> None:
    changed = override(Experiment(), [assignment])
    assert read(changed)
    assert (changed == Experiment()) == (assignment in ("limit=none", "note=None"))


@pytest.mark.parametrize(
    ("assignment", "answer"),
    [
        ("seed", "expected field=value, got seed; "),
        ("=3", "expected field=value, got =3; "),
        ("sede=1", r"expected a field of Experiment, got sede; did you mean seed\?"),
        ("zzz=1", "expected a field of Experiment, got zzz; choose from name, seed, "),
        ("model.widht=1", r"expected a field of Model \(model\), got widht; did you mean width\?"),
        ("derived=4", "expected a field of Experiment, got derived; "),
        ("seed=1.5", "expected seed to be int, got 1.5; "),
        ("seed=true", "expected seed to be int, got true; "),
        ("rate=fast", "expected rate to be float, got fast; "),
        ("remat=yes", "expected remat to be bool, got yes; write true or false"),
        ("limit=few", "expected limit to be int or none, got few; "),
        ("rule=eror", r"expected rule to be one of drop, error, got eror; did you mean error\?"),
        ("model=big", "expected model to be Model, got big; set its fields one by one"),
        ("data=Reel", r"expected data to be Synthetic or Real or Needy, got Reel; .* Real\?"),
        ("data=Needy", r"expected a class with defaults for data, got Needy \(.*directory"),
        ("seed.x=1", "expected seed to have fields, got int; "),
        ("shape=1,2,3", "expected shape to be a tuple of int, float, got 1,2,3; "),
        ("shape=1,x", "expected shape to be a tuple of int, float, got 1,x; "),
        ("policies.2.beta=1", r"expected a field of tuple \(policies\), got 2; "),
        ("policies.0.beat=1", r"expected a field of Policy \(policies.0\), got beat; .* beta\?"),
        ("model.heads=5", "expected heads to divide width, got 5 and 64"),
    ],
)
def test_a_wrong_setting_is_answered(assignment: str, answer: str) -> None:
    with pytest.raises(ValueError, match=answer) as caught:
        override(Experiment(), [assignment])
    assert "\n" not in str(caught.value)


def test_settings_apply_together() -> None:
    changed = override(
        Experiment(), ["model.width=30", "model.heads=5", "data=Real", "data.directory=x", "seed=1"]
    )
    assert (changed.model, changed.data, changed.seed) == (Model(30, 5), Real("x"), 1)
    assert override(Experiment(), ["seed=1", "seed=2"]).seed == 2
    assert Experiment().seed == 0


def test_an_experiment_is_read(tmp_path: Path) -> None:
    path = tmp_path / "toy.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Toy:\n"
        "    seed: 'int' = 3\n"
        "experiment = Toy()\n"
    )
    experiment = load(path)
    assert to_dict(experiment) == {"seed": 3}
    assert override(experiment, ["seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("x = 1", "expected a dataclass named experiment in .*toy.py, got NoneType; write"),
        ("experiment = 1", "expected a dataclass named experiment in .*toy.py, got int; write"),
        ("x = 1\nx = (", "expected Python, got .* in .*toy.py, line 2"),
        ("x = 1\n\nf = 1 / 0\nx = 2", "toy.py, line 3: ZeroDivisionError: division by zero"),
        ("import nonesuch", "toy.py, line 1: ModuleNotFoundError: No module named 'nonesuch'"),
    ],
)
def test_a_wrong_experiment_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, answer: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.py").write_text(source)
    with pytest.raises(ValueError, match=answer) as caught:
        load(Path("toy.py"))
    assert "\n" not in str(caught.value)


def test_a_missing_experiment_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"expected .* did you mean quickstart.py\?"):
        load(tmp_path / "quickstrat.py")
    with pytest.raises(FileNotFoundError, match=r"expected an experiment file"):
        load(tmp_path)


def test_a_configuration_fits_into_json() -> None:
    told = json.loads(json.dumps(to_dict(Experiment(rate=math.inf)), allow_nan=False))
    assert told["rate"] == "inf"
    assert told["policies"][1] == {"transformation": "log", "beta": 0.3}
    assert (told["limit"], told["remat"], told["shape"]) == (None, False, [1, 1.0])
