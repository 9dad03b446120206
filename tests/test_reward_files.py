"""The same rewards from every format and form; whatever is wrong with them is named by its line."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from written_rewards import (
    JUDGE,
    PROMPTS,
    REWARDS,
    WRITERS,
    long_rows,
    numbered_rows,
    wide_rows,
    write_csv,
    write_json,
    write_npz,
    write_parquet,
)

from infalign_jax import reward_files
from infalign_jax.tables import prompt_text


@pytest.mark.parametrize(
    ("write", "name", "rows"),
    [
        (write_json, "a.jsonl", long_rows),
        (write_json, "a.ndjson", wide_rows),
        (write_json, "a.JSONL", numbered_rows),
        (write_csv, "a.csv", long_rows),
        (write_csv, "a.csv", numbered_rows),
        (write_parquet, "a.parquet", long_rows),
        (write_parquet, "a.parquet", wide_rows),
        (write_parquet, "a.parquet", numbered_rows),
    ],
)
def test_every_format_and_form_holds_the_same(
    write: Callable[[Path, Any], Path], name: str, rows: Callable[[], Any], tmp_path: Path
) -> None:
    for drop in ((), ("judge",)):
        kept = [{k: v for k, v in row.items() if not k.startswith(drop or "-")} for row in rows()]
        found = reward_files.read(write(tmp_path / name, kept))
        assert found.prompts == PROMPTS
        assert found.rewards.dtype == np.float64
        np.testing.assert_array_equal(found.rewards, REWARDS)
        if drop:
            assert found.judge is None
        else:
            np.testing.assert_array_equal(found.judge, JUDGE)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64])
def test_arrays(dtype: Any, tmp_path: Path) -> None:
    arrays = {"rewards": np.array([[1, 2], [3, 0]], dtype), "judge": np.array([[0, 5], [5, 0]])}
    found = reward_files.read(write_npz(tmp_path / "a.npz", **arrays))
    assert found.prompts == ("0", "1")
    np.testing.assert_array_equal(found.rewards, [[1, 2], [3, 0]])
    np.testing.assert_array_equal(found.judge, [[0, 5], [5, 0]])
    named = write_npz(tmp_path / "b.npz", rewards=REWARDS, prompts=np.array(PROMPTS))
    assert reward_files.read(named).prompts == PROMPTS
    assert reward_files.read(named).judge is None
    flat = write_npz(tmp_path / "c.npz", reward=REWARDS.ravel(), prompts=np.repeat(PROMPTS, 4))
    np.testing.assert_array_equal(reward_files.read(flat).rewards, REWARDS)


@pytest.mark.parametrize(
    "kind", [pyarrow.list_(pyarrow.float32()), pyarrow.large_list(pyarrow.int64()),
             pyarrow.list_(pyarrow.float64(), 2)]
)  # fmt: skip
def test_parquet_lists_of_any_kind_in_many_chunks(kind: pyarrow.DataType, tmp_path: Path) -> None:
    rows = np.arange(200).reshape(100, 2)
    columns = {"prompt": range(100), "rewards": pyarrow.array(rows.tolist(), kind)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=7)
    found = reward_files.read(tmp_path / "a.parquet")
    np.testing.assert_array_equal(found.rewards, rows)
    assert found.prompts == tuple(map(str, range(100)))


def test_a_chat_is_the_same_prompt_in_json_and_parquet(tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": "Hé?"}],
        [
            {"role": "system", "content": "Be brief.", "name": "boss"},
            {"role": "user", "content": ""},
        ],
    ]
    rows = [{"prompt": chat, "rewards": [1.0, 2.0]} for chat in chats]
    expected = tuple(map(prompt_text, chats))
    assert reward_files.read(write_json(tmp_path / "a.jsonl", rows)).prompts == expected
    # Arrow gives every message the field `name`, null where it has none.
    assert reward_files.read(write_parquet(tmp_path / "a.parquet", rows)).prompts == expected


def test_a_judge_of_nothing_is_none(tmp_path: Path) -> None:
    for row in ({"reward": 1.0, "judge": None}, {"reward_0": 1.0, "judge_0": None}):
        written = [write(tmp_path / name, [{"prompt": "a"} | row]) for write, name in WRITERS]
        assert [reward_files.read(path).judge for path in written] == [None] * 3


ROW = {"prompt": "a", "reward": 1.0}

BROKEN_ROWS = [
    ([ROW, ROW | {"reward": "good"}], "(line 3|row 1): expected reward to be a number, got 'good'"),
    ([ROW | {"judge": 1.0}, ROW | {"judge": None}], r"(line 3|row 1): .*judge's reward in every"),
    ([ROW, ROW | {"reward": float("inf")}], "(line 3|row 1): .* reward to be finite, got inf"),
    ([ROW | {"reward": float("nan")}], "(line [12]|row 0): expected reward to be finite, got nan"),
    ([ROW | {"judge": float("nan")}], "(line [12]|row 0): expected judge to be finite, got nan"),
    ([{"prompt": "a", "rewrad": 1}], r"a column 'reward', got .*: did you mean 'rewrad'\? Ren"),
    ([{"prompts": "a", "reward": 1}], "a column 'prompt', got .*: did you mean 'prompts'"),
    ([{"x": 1}], "expected a column 'reward', got 'x': add it"),
    ([ROW, ROW, {"prompt": "b", "reward": 1}], "got 2 to 'a' and 1 to 'b': .* keep 1 rows"),
    ([ROW | {"reward_0": 1.0}], "got both: keep one"),
    ([{"prompt": "a", "reward_0": 1.0, "reward_2": 2.0}], "expected a column 'reward_1'"),
    ([{"prompt": "a", "reward_0": 1.0, "judge_0": 1.0, "judge_1": 1.0}], "judge to be a list of 1"),
    ([ROW, ROW | {"reward": None}], "(line 3|row 1): expected reward to be a number, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "name"), WRITERS)
@pytest.mark.parametrize(("rows", "message"), BROKEN_ROWS)
def test_what_is_wrong_is_named(
    write: Callable[[Path, Any], Path], name: str, rows: Any, message: str, tmp_path: Path
) -> None:
    if write is write_parquet and isinstance(rows[-1].get("reward"), str):
        rows = [row | {"reward": str(row["reward"])} for row in rows]  # a column has one type
        message = "row 0: expected reward to be a number, got '1.0'"
    path = write(tmp_path / name, rows)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}(, |: ).*{message}") as caught:
        reward_files.read(path)
    assert "\n" not in str(caught.value)


WIDE = {"prompt": "a", "rewards": [1.0, 2.0]}


@pytest.mark.parametrize(("write", "name"), [WRITERS[0], WRITERS[2]])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([WIDE, {"prompt": "b", "rewards": [1.0]}], "(line 3|row 1): .*a list of 2 .*a list of 1"),
        ([WIDE, {"prompt": "b", "rewards": [1.0, None]}], "(line 3|row 1): .* number, got None"),
        ([WIDE, {"prompt": "b", "rewards": [1.0, float("nan")]}], "(line 3|row 1): .* got nan"),
        ([WIDE, {"prompt": "b", "rewards": None}], "(line 3|row 1): .*list of 2 .*got None"),
        ([WIDE | {"rewards": []}], "(line 1|row 0): .*list of K .*got a list of 0"),
        ([WIDE, WIDE | {"prompt": "b"}, WIDE], "(line 5|row 2): .*'a', .*(line 1|row 0)"),
        ([WIDE | {"judge": [1.0]}], "(line 1|row 0): expected judge to be a list of 2"),
        ([WIDE | {"judge": [1.0, 2.0, 3.0]}], "(line 1|row 0): expected judge to be a list of 2"),
        ([WIDE | {"judge": 1.0}], "(line 1|row 0): expected judge to be a list of 2 .*got 1.0"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_list_is_named(
    write: Callable[[Path, Any], Path], name: str, rows: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{name}(, |: ){message}"):
        reward_files.read(write(tmp_path / name, rows))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"rewrads": np.ones((2, 2))}, "did you mean 'rewrads'"),
        ({"rewards": np.ones(2)}, "row 0: .* a list of K numbers, .* got 1.0"),
        ({"rewards": np.ones((2, 2, 2))}, "row 0: .* a number, got"),
        ({"rewards": np.ones((2, 0))}, "row 0: .* got a list of 0"),
        ({"rewards": np.ones((0, 2))}, "at least one row"),
        ({"rewards": np.array([["1", "2"]])}, "row 0: .* a number, got '1'"),
        ({"rewards": np.ones((2, 2), bool)}, "row 0: .* a number, got True"),
        ({"rewards": np.array([[1.0, 2.0], [1.0, np.nan]])}, "row 1: .* finite, got nan"),
        ({"rewards": np.ones((2, 2)), "judge": np.ones((2, 3))}, "row 0: .*judge .* list of 2"),
        ({"rewards": np.ones((2, 2)), "judge": np.ones((3, 2))}, "arrays of as many rows"),
        ({"rewards": np.ones((2, 2)), "prompts": np.array(["a"])}, "arrays of as many rows"),
        ({"rewards": np.ones((2, 2)), "prompts": np.array(["a", "a"])}, "row 1: .* prompt once"),
        ({"rewards": np.ones((2, 2)), "prompts": np.array([b"a", b"b"])}, "row 0: .* got b'a'"),
        ({"rewards": np.float64(1.0)}, "arrays of as many rows"),
    ],
)  # fmt: skip
def test_broken_arrays(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz(, |: ).*{message}"):
        reward_files.read(path)
