"""Pairs come back from the disk as they were, whole or not at all."""

import json

import pytest

from infalign_jax import store
from infalign_jax.data import Pair

PAIRS = [Pair(f"\n\nHuman: {n} é日😀?\n\nAssistant:", f" yes\n{n} ", " \tno") for n in range(300)]
SPLITS = {"train": PAIRS[:250], "judge": PAIRS[250:270], "test": PAIRS[270:]}


def test_every_split_comes_back_in_order_and_unchanged(tmp_path):
    store.write({name: iter(pairs) for name, pairs in SPLITS.items()}, tmp_path)
    assert {name: store.read(tmp_path, name) for name in SPLITS} == SPLITS
    assert list(tmp_path.rglob("*-train.array_record-*"))


def test_nothing_is_printed(tmp_path, capfd):
    store.write(SPLITS, tmp_path)
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_same_pairs_are_written_once(tmp_path):
    store.write(SPLITS, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    store.write(SPLITS, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_other_pairs_do_not_pass_for_those_asked_for(tmp_path):
    store.write(SPLITS, tmp_path)
    with pytest.raises(ValueError, match=r"expected no other data set in .* got one of other"):
        store.write(SPLITS | {"train": PAIRS[:249]}, tmp_path)
    assert store.read(tmp_path, "train") == PAIRS[:250]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    leftover = tmp_path / store.NAME / f"incomplete.ABCDEF_{store.VERSION}"
    leftover.mkdir(parents=True)
    (leftover / "half.array_record").write_bytes(b"half")
    with pytest.raises(ValueError, match="got none: write them first"):
        store.read(tmp_path, "train")
    store.write(SPLITS, tmp_path)
    assert not leftover.exists()
    assert store.read(tmp_path, "test") == SPLITS["test"]


def test_a_write_that_fails_leaves_nothing_to_read(tmp_path):
    with pytest.raises(RuntimeError, match="Unicode"):
        store.write({"train": PAIRS[:5], "test": [Pair("\ud800", "a", "b")]}, tmp_path)
    with pytest.raises(ValueError, match="got none: write them first"):
        store.read(tmp_path, "train")


def test_a_prompt_in_two_splits_is_refused(tmp_path):
    overlap = {"train": PAIRS[:5], "test": [PAIRS[4]._replace(chosen="other")]}
    with pytest.raises(ValueError, match=r"every prompt in one split, .* in train and test"):
        store.write(overlap, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_split_without_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected pairs in every split, got none in test"):
        store.write({"train": PAIRS[:5], "test": []}, tmp_path)


def test_an_unknown_split_is_answered_with_those_there_are(tmp_path):
    store.write(SPLITS, tmp_path)
    with pytest.raises(ValueError, match=r"the split 'dev' .* got only train, judge, test"):
        store.read(tmp_path, "dev")


def test_the_files_are_what_tfds_documents(tmp_path):
    store.write(SPLITS, tmp_path)
    (info,) = tmp_path.rglob("dataset_info.json")
    assert json.loads(info.read_text())["fileFormat"] == "array_record"
