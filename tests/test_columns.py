"""A file that is broken, hostile or not there: named, in one line, and nothing is run."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_rewards import (
    JUDGE,
    PROMPTS,
    REWARDS,
    WRITERS,
    long_rows,
    write_npz,
    write_parquet,
)

from infalign_jax import reward_files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a", "reward": 1}\n{"prompt"\n', "line 2: expected a JSON object"),
        ("a.jsonl", b'{"prompt": "a", "reward": 1}\n[1]\n', r"line 2: .* JSON object, got \[1\]"),
        ("a.jsonl", b'{"prompt": "a", "reward": true}', "line 1: .* a number, got True"),
        ("a.jsonl", b'{"prompt": "a", "reward": "1.0"}', "line 1: .* a number, got '1.0'"),
        ("a.jsonl", b'{"prompt": "a", "reward": 1%s}' % (b"0" * 400), "line 1: .* finite, got inf"),
        ("a.jsonl", b'{"prompt": 0.5, "reward": 1}', "line 1: expected a prompt that is a string"),
        ("a.jsonl", b'{"prompt": "\\ud800", "reward": 1}', "line 1: .* valid characters"),
        ("a.jsonl", b'{"reward": 1}\n{"prompt": "a", "reward": 1}', "line 1: .* prompt .* None"),
        ("a.jsonl", b"[" * 9999, "line 1: expected a JSON object"),
        ("a.jsonl", b'{"prompt": "a", "reward": 1}\n\xff\n', "expected UTF-8"),
        ("a.jsonl", b"", "expected a column 'reward', got none"),
        ("a.csv", b"", "expected a column 'reward', got none"),
        ("a.csv", b"prompt,reward\n", "expected at least one row, got none"),
        ("a.csv", b"prompt,reward\na,1\n\na,b,1\n", "line 4: expected 2 cells, .* got 3"),
        ("a.csv", b"prompt,reward\n'a\nb',1\n", "line 2: expected 2 cells, .* got 1"),
        ("a.csv", b'prompt,reward\n"a\nb",1\nc,x\n', "line 4: .* a number, got 'x'"),
        ("a.csv", b'prompt,reward\n"a"b,1\n', "line 2: expected CSV"),
        ("a.csv", b"prompt,reward\na,1_0\n", "line 2: .* a number, got '1_0'"),
        ("a.csv", b"prompt,reward,reward\na,1,2\n", "expected columns of distinct names"),
        ("a.csv", b"prompt,reward\n\xff,1\n", "expected UTF-8"),
        ("a.csv", b"prompt,reward_0,reward_1\na,1,\n", "line 2: .* a number, got None"),
        ("a.parquet", b"PAR1 nonsense PAR1", "expected Parquet"),
        ("a.npz", b"nonsense", "expected an NPZ file"),
        ("a.npz", b"", "expected an NPZ file"),
        ("a.json", b"[]", "ends in .jsonl, .ndjson, .csv, .parquet or .npz, got '.json'"),
    ],
)  # fmt: skip
def test_broken_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}(, |: )({message}|.*{message})") as caught:
        reward_files.read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 320


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("exploded").write_text, ("",))


def test_a_file_from_a_stranger_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", rewards=np.array([[Bomb()]], object))
    Path("b.npz").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError, match="expected an NPZ file of plain arrays"):
            reward_files.read(name)
    assert not Path("exploded").exists()


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", long_rows())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"expected pyarrow.* pip install pyarrow"):
        reward_files.read(path)


def test_a_missing_file_is_the_system_s_error(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.npz"):
        with pytest.raises(FileNotFoundError):
            reward_files.read(tmp_path / name)


@pytest.mark.parametrize(("write", "name"), [*WRITERS, (None, "a.npz")])
def test_a_damaged_file_gives_rewards_or_a_line_never_a_crash(
    write: Callable[[Path, Any], Path] | None, name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if write:
        write(path, long_rows())
    else:
        write_npz(path, rewards=REWARDS, judge=JUDGE, prompts=np.array(PROMPTS))
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    errors = []
    for trial in range(300):
        length = generator.integers(1, len(whole)) if trial % 2 else len(whole)
        damaged = bytearray(whole[:length])
        damaged[generator.integers(len(damaged))] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            found = reward_files.read(path)
        except ValueError as error:
            errors.append(str(error))
        else:
            assert np.all(np.isfinite(found.rewards))
            assert len(found.prompts) == len(found.rewards)
    assert len(errors) > 150
    assert all(str(path) in error for error in errors)
