"""A table holds what was written, is read without this package, and shows every damaged byte."""

import hashlib
import json
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infalign_jax import __version__, tables

PROMPTS = ["one", "", "Grüße, 世界", 17, [{"role": "user", "content": "Why?"}], "x" * 5000]
REWARDS = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "reference.table"
    tables.write(path, PROMPTS, REWARDS, {"reward_model": "rm-1", "created": "now"})
    return path


def test_each_prompt_finds_its_rewards_sorted(path: Path) -> None:
    table = tables.load(path, verify=True)
    for order in ([0, 1, 2, 3, 4, 5], [5, 0, 0, 3], [2], []):
        found = tables.look_up(table, [PROMPTS[i] for i in order])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.sort(REWARDS[order], axis=1))


def test_a_thousand_prompts_and_as_many_strangers(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(2000)]
    rewards = np.arange(2000.0).reshape(1000, 2)
    tables.write(tmp_path / "t", prompts[::2], rewards, {})
    rows = tables.find(tables.load(tmp_path / "t"), prompts)
    assert np.all(rows[1::2] == -1)
    assert sorted(rows[::2]) == list(range(1000))
    np.testing.assert_array_equal(tables.load(tmp_path / "t").rewards[rows[::2]], rewards)


def test_what_made_it_is_kept(path: Path, tmp_path: Path) -> None:
    about = tables.load(path).about
    assert about["reward_model"] == "rm-1"
    assert about["created"] == "now"
    assert about["libraries"] == {
        "infalign-jax": __version__, "jax": sys.modules["jax"].__version__, "numpy": np.__version__,
    }  # fmt: skip
    for length in range(5):
        tables.write(tmp_path / "dated", ["a"], [[1.0]], {"name": "x" * length})
        table = tables.load(tmp_path / "dated")
        assert table.about["created"].startswith("20")
        assert ((tmp_path / "dated").stat().st_size - table.hashes.nbytes - 4) % 64 == 0


def test_the_format_is_as_documented(path: Path) -> None:
    """Another reader, from the module's docstring alone, with linear search."""
    content = path.read_bytes()
    assert content[:8] == bytes.fromhex("894941540d0a1a0a")
    version, length = struct.unpack("<II", content[8:16])
    assert version == 1
    assert (32 + length) % 64 == 0
    header, rest = content[32 : 32 + length], content[32 + length :]
    assert hashlib.blake2b(header, digest_size=16).digest() == content[16:32]
    described = json.loads(header.decode())
    count, k = described["prompts"], described["responses"]
    assert (count, k, len(rest)) == (6, 5, 6 * 16 + 6 * 5 * 4)
    hashes, rewards = rest[: 16 * count], rest[16 * count :]
    for part, name in ((hashes, "prompts_digest"), (rewards, "rewards_digest")):
        assert hashlib.blake2b(part, digest_size=32).hexdigest() == described[name]
    split = [hashes[16 * i : 16 * i + 16] for i in range(count)]
    assert split == sorted(split)
    texts = [*PROMPTS[:3], "17", '[{"content":"Why?","role":"user"}]', PROMPTS[5]]
    for text, row in zip(texts, REWARDS, strict=True):
        at = split.index(hashlib.blake2b(str(text).encode(), digest_size=16).digest())
        assert list(struct.unpack_from("<5f", rewards, 20 * at)) == sorted(row.tolist())


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("17", "17"),
        (17, "17"),
        (np.int64(17), "17"),
        (np.str_("a"), "a"),
        ([{"role": "user", "content": "é\n"}], '[{"content":"é\\n","role":"user"}]'),
        (({"content": "é\n", "role": "user", "name": None},), '[{"content":"é\\n","role":"user"}]'),
        ([{"b": [{"d": None, "c": 1}], "a": True}], '[{"a":true,"b":[{"c":1}]}]'),
    ],
)
def test_the_text_of_a_prompt(prompt: Any, text: str) -> None:
    assert tables.prompt_text(prompt) == text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "a string, an integer or a list of messages, got None"),
        (True, "got True"),
        (0.5, "got 0.5"),
        (b"a", "got b'a'"),
        ("\ud800", "valid characters"),
        ([{"role": "user", "content": {1, 2}}], "JSON's types"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tables.write(tmp_path / "t", [prompt], [[1.0]], {})


@pytest.mark.parametrize(
    ("prompts", "rewards", "about", "message"),
    [
        (["a", "b", "a"], np.ones((3, 2)), {}, "distinct prompts, got 'a' twice"),
        (["1", 1], np.ones((2, 2)), {}, "distinct prompts, got '1' twice"),
        (["a", "b"], [[1, 2], [3, np.nan]], {}, "got nan at prompt 'b', response 1"),
        (["a"], [[1.0, -1e39]], {}, "finite in float32, got -inf at prompt 'a', response 1"),
        (["a"], np.ones((2, 2)), {}, r"shape \[1, K\].* got \(2, 2\)"),
        (["a"], [1.0], {}, r"shape \[1, K\].* got \(1,\)"),
        (["a"], [[]], {}, r"at least one, got \(1, 0\)"),
        ([], np.ones((0, 4)), {}, r"at least one, got \(0, 4\)"),
        (["a"], [[1.0]], {"model": object()}, "`about` to be JSON"),
        (["a"], [[1.0]], {"beta": float("nan")}, "`about` to be JSON"),
    ],
)
def test_what_is_no_table_is_not_written(
    prompts: Any, rewards: Any, about: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tables.write(tmp_path / "t", prompts, rewards, about)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_hash_alike_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_hash", lambda data: b"h" * 16)
    with pytest.raises(ValueError, match="distinct hashes, got 'a' and 'b'"):
        tables.write(tmp_path / "t", ["a", "b"], np.ones((2, 2)), {})


def test_a_missing_prompt_is_named(path: Path) -> None:
    table = tables.load(path)
    with pytest.raises(ValueError, match=r"got 'two' \(2 of 3 are not in it\): score"):
        tables.look_up(table, ["one", "two", [{"role": "user", "content": "Who?"}]])
    assert tables.find(table, [f"{i}" for i in range(999)]).max() == tables.find(table, ["17"])


def test_every_damaged_byte_and_every_cut_is_seen(path: Path) -> None:
    content = path.read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path}: expected "):
            tables.load(path, verify=True)
    for length in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{path}: expected "):
            tables.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"expected \d+ bytes, got \d+: the file is damaged"):
        tables.load(path)


def remade(header: Any, rest: bytes, version: int = 1) -> bytes:
    """A file with right digests of whatever it holds, as another program may have written it."""
    if isinstance(header, dict):
        header = json.dumps(header)
    packed = header.encode()
    digest = hashlib.blake2b(packed, digest_size=16).digest()
    magic = b"\x89IAT\r\n\x1a\n"
    return struct.pack("<8sII16s", magic, version, len(packed), digest) + packed + rest


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[]", "fields of tables.py in the header"),
        ("{", "fields of tables.py in the header"),
        ('{"prompts": 1}', "fields of tables.py in the header"),
        ({"prompts": -1}, "fields of tables.py in the header"),
        ({"responses": 0}, "fields of tables.py in the header"),
        ({"responses": "2"}, "fields of tables.py in the header"),
        ({"about": None}, "fields of tables.py in the header"),
        ({"prompts": 10**15}, "bytes, got "),
    ],
)
def test_a_stranger_s_header_is_checked(header: Any, message: str, tmp_path: Path) -> None:
    described = {"prompts": 2, "responses": 2, "prompts_digest": "", "rewards_digest": ""}
    described |= {"about": {}}
    whole = described | header if isinstance(header, dict) else header
    (tmp_path / "t").write_bytes(remade(whole, bytes(48)))
    with pytest.raises(ValueError, match=message):
        tables.load(tmp_path / "t")


@pytest.mark.parametrize(
    ("hashes", "rewards", "good"),
    [
        ("ab", [1, 2, 3, 3], True),
        ("ba", [1, 2, 3, 3], False),
        ("aa", [1, 2, 3, 3], False),
        ("ab", [1, 2, 3, 2], False),
        ("ab", [1, 2, 3, np.inf], False),
        ("ab", [np.nan, 2, 3, 3], False),
    ],
)
def test_a_stranger_s_order_is_checked(
    hashes: str, rewards: list[float], good: bool, tmp_path: Path
) -> None:
    parts = b"".join(letter.encode() * 16 for letter in hashes), struct.pack("<4f", *rewards)
    digests = [hashlib.blake2b(part, digest_size=32).hexdigest() for part in parts]
    header = {"prompts": 2, "responses": 2, "about": {}}
    header |= dict(zip(("prompts_digest", "rewards_digest"), digests, strict=True))
    (tmp_path / "t").write_bytes(remade(header, b"".join(parts)))
    if good:
        assert tables.load(tmp_path / "t", verify=True).rewards.tolist() == [[1, 2], [3, 3]]
    else:
        with pytest.raises(ValueError, match="finite rewards in increasing order, got others"):
            tables.load(tmp_path / "t", verify=True)


def test_another_version_and_another_file_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(remade({}, b"", version=2))
    with pytest.raises(ValueError, match="expected a table of version 1, got 2: upgrade"):
        tables.load(tmp_path / "t")
    other_line_ends = b"\x89IAT\n\x1a\n" + b"\0" * 99
    for content in (b"", b"PK\x03\x04 and so on", other_line_ends):
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(ValueError, match="expected a calibration table, got a file that"):
            tables.load(tmp_path / "t")
    with pytest.raises(FileNotFoundError):
        tables.load(tmp_path / "nowhere")


def test_opening_reads_next_to_nothing(tmp_path: Path) -> None:
    """A table of half a gigabyte of holes opens under a limit of memory far below its size."""
    count, k = 2**20, 120
    header = json.dumps(
        {"prompts": count, "responses": k, "prompts_digest": "", "rewards_digest": "", "about": {}}
    )
    path = tmp_path / "t"
    path.write_bytes(remade(header.ljust(-(32 + len(header)) % 64 + len(header)), b""))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + count * 16 + count * k * 4)
    source = (
        "import resource, sys; from infalign_jax import tables\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "table = tables.load(sys.argv[1]); tables.find(table, ['a', 'b'])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", source, str(path)]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 8000  # KiB


def test_a_full_disk_leaves_the_old_table(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            tables.write(path, range(1000), np.ones((1000, 64)), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in path.parent.iterdir()] == ["reference.table"]
    assert tables.load(path, verify=True).about["reward_model"] == "rm-1"


def test_an_open_table_outlives_a_new_one_in_its_place(path: Path) -> None:
    old = tables.load(path)
    tables.write(path, ["one"], [[1.0]], {})
    np.testing.assert_array_equal(tables.look_up(old, ["one"])[0], np.sort(REWARDS[0]))
    assert tables.look_up(tables.load(path), ["one"]).tolist() == [[1.0]]
