"""The same rewards written in every format and form, for the tests that read them."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

PROMPTS = ('Why, "so"?\nBecause.', "Grüße, 世界", "17")
REWARDS = np.array([[0.1, -2.5, 3e-9, 1.0], [7.0, 7.0, -0.0, 1e300], [5.0, 4.0, 3.0, 2.0]])
JUDGE = REWARDS[::-1] / 3
ORDER = [0, 4, 8, 1, 5, 2, 9, 3, 6, 10, 7, 11]  # prompts interleaved, each one's rows in order


def long_rows() -> list[dict[str, Any]]:
    return [
        {"text": "x", "prompt": PROMPTS[i // 4], "judge": float(JUDGE.flat[i])}
        | {"reward": float(REWARDS.flat[i])}
        for i in ORDER
    ]


def wide_rows() -> list[dict[str, Any]]:
    rows = zip(PROMPTS, REWARDS.tolist(), JUDGE.tolist(), strict=True)
    return [{"prompt": p, "rewards": r, "judge": j, "rewards_mean": 0.5} for p, r, j in rows]


def numbered_rows() -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"]}
        | {f"{name}_{i}": row[key][i] for name, key in NUMBERED for i in (3, 1, 0, 2)}
        for row in wide_rows()
    ]


NUMBERED = (("judge", "judge"), ("reward", "rewards"))


def write_json(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8-sig")
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=2)
    return path


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


WRITERS = ((write_json, "a.jsonl"), (write_csv, "a.csv"), (write_parquet, "a.parquet"))
