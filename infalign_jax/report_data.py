"""What a report reads: the stored results of a run, checked as far as the report relies on them."""

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infalign_jax import notation
from infalign_jax.runtime import goodput

NUMBER = (int, float)
RESPONSE = {"text": str, "reward": NUMBER}
RESULTS = {
    "experiment": str,
    "seed": int,
    "device": str,
    "policies": [
        {
            "transformation": str,
            "beta": NUMBER,
            "kl": NUMBER,
            "kl_standard_error": NUMBER,
            "win_rates": dict,
        }
    ],
    "reward_model": {"accuracy": NUMBER, "standard_error": NUMBER},
    "calibration": {"absolute_error_before": NUMBER, "absolute_error_after": NUMBER},
}
RATE = {"mean": NUMBER, "standard_error": NUMBER}
SAMPLES = [
    {
        "prompt": str,
        "reference": [RESPONSE],
        "policies": [{"name": str, "responses": [RESPONSE], "best": int}],
    }
]
NAMES = {
    NUMBER: "a number",
    str: "a text",
    int: "a whole number",
    dict: "an object",
    list: "a list",
}
LABELS = {"stage", "policy", "digest"}
NO_CURVE = LABELS | {"step", "seconds", *goodput.OF_A_STEP}
AGAIN = "run the evaluate stage again"

Lines = dict[str, tuple[np.ndarray, np.ndarray]]  # step [n], value [n] by policy name


@dataclass(frozen=True)
class Run:
    """What a run stored.

    >>> Run({}, [], {}, []).metrics
    []
    """

    results: dict[str, Any]  # results.json
    metrics: list[dict[str, Any]]  # metrics.jsonl, an object a line
    quantiles: dict[str, np.ndarray]  # evaluation.npz: û before, after and under each policy, [n]
    samples: list[dict[str, Any]]  # samples.json, an object a prompt


def read(out: Path) -> Run:
    """Read and check results.json, metrics.jsonl, evaluation.npz and samples.json in `out`.

    Raises:
        ValueError: one line that names the file, what was expected and what came.

    >>> read(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: nowhere/results.json: expected a stored file, got none: run the evaluate stage again
    """
    results = _json(_stored(out / "results.json"), out / "results.json")
    _check(results, RESULTS, str(out / "results.json"))
    for i, policy in enumerate(results["policies"]):
        _named(
            notation.canonical, policy["transformation"], f"{out / 'results.json'}: policies[{i}]"
        )
        for procedure, rates in policy["win_rates"].items():
            where = f"{out / 'results.json'}: policies[{i}].win_rates.{procedure}"
            _named(notation.procedure, procedure, where)
            _check(rates, dict, where)
            for scorer, rate in rates.items():
                _check(rate, RATE if rate else dict, f"{where}.{scorer}")
    samples = _json(_stored(out / "samples.json"), out / "samples.json")
    _check(samples, SAMPLES, str(out / "samples.json"))
    for i, sample in enumerate(samples):
        counts = [(0, len(sample["reference"]))]
        counts += [(policy["best"], len(policy["responses"])) for policy in sample["policies"]]
        for best, count in counts:
            if not 0 <= best < count:
                raise ValueError(
                    f"{out / 'samples.json'}: [{i}]: expected response {best} among those stored, "
                    f"got {count} responses: {AGAIN}"
                )
    return Run(results, _metrics(out / "metrics.jsonl"),
               _quantiles(out / "evaluation.npz", len(results["policies"])), samples)  # fmt: skip


def lead(results: Mapping[str, Any]) -> str:
    """The procedure that a run is about: as it says, else best of 4, else the first measured.

    >>> lead({"policies": [{"win_rates": {"standard": {}, "best_of_4": {}}}]})
    'best_of_4'
    """
    measured = [name for policy in results["policies"] for name in policy["win_rates"]]
    wished = [results.get("procedure"), "best_of_4", *measured]
    return next((name for name in wished if name in measured), "standard")


def training_lines(metrics: list[dict[str, Any]]) -> dict[str, dict[str, Lines]]:
    """Stage → metric → policy ("" where a stage has none) → step [n] and value [n].

    >>> rows = [{"stage": "sft", "step": i, "seconds": 0.1, "loss": 2.0 - i} for i in range(2)]
    >>> training_lines(rows)["sft"]["loss"][""][1]
    array([2., 1.])
    """
    points: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for row in metrics:
        for name, value in row.items():
            if name in NO_CURVE or value is None:
                continue
            lines = points.setdefault(row["stage"], {}).setdefault(name, {})
            lines.setdefault(row.get("policy") or "", []).append((row["step"], float(value)))
    return {
        stage: {
            name: {policy: tuple(np.array(xy, float).T) for policy, xy in lines.items()}
            for name, lines in fields.items()
        }
        for stage, fields in points.items()
    }


def _stored(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a stored file, got none: {AGAIN}") from None


def _json(data: bytes, where: object) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # malformed JSON or UTF-8
        raise ValueError(f"{where}: expected JSON, got {error}: {AGAIN}") from None


def _metrics(path: Path) -> list[dict[str, Any]]:
    rows = []
    for i, line in enumerate(_stored(path).splitlines(), 1):
        where = f"{path}, line {i}"
        row = _json(line, where)
        _check(row, {"stage": str, "step": int}, where)
        for name, value in row.items():
            if name not in LABELS and value is not None:
                try:
                    float(value)
                except (TypeError, ValueError):
                    raise ValueError(
                        f"{where}: {name}: expected a number, got {value!r}: {AGAIN}"
                    ) from None
        rows.append(row)
    return rows


def _quantiles(path: Path, policies: int) -> dict[str, np.ndarray]:
    names = ["quantiles_before", "quantiles_after"]
    names += [f"policy_quantiles/{i}" for i in range(policies)]
    data = io.BytesIO(_stored(path))
    try:
        with np.load(data, allow_pickle=False) as stored:
            quantiles = {name: np.asarray(stored[name], float).ravel() for name in names}
    except KeyError as error:
        raise ValueError(f"{path}: expected an array, got none: {error.args[0]}: {AGAIN}") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a NumPy archive, got {error}: {AGAIN}") from None
    for name, values in quantiles.items():
        if not (values.size and np.all((values >= 0) & (values <= 1))):
            raise ValueError(
                f"{path}: {name}: expected quantiles in [0, 1], got {values[:3]}: {AGAIN}"
            )
    return quantiles


def _named(parse: Callable[[str], object], name: str, where: str) -> None:
    try:
        parse(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check(value: Any, shape: Any, where: str) -> None:
    """Raise ValueError unless the value is of a type, or an object or list of such shapes."""
    kind = type(shape) if isinstance(shape, dict | list) else shape
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: expected {NAMES[kind]}, got {value!r:.60}: {AGAIN}")
    if isinstance(shape, list):
        for i, item in enumerate(value):
            _check(item, shape[0], f"{where}[{i}]")
    if isinstance(shape, Mapping):
        for key, item in shape.items():
            if key not in value:
                raise ValueError(f"{where}: expected the key {key!r}, got none: {AGAIN}")
            _check(value[key], item, f"{where}.{key}")
