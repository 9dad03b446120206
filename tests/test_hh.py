"""HH rows become pairs; what is dropped is counted, what is malformed is named by its line."""

import gzip
import json
from pathlib import Path

import pytest
from etils.epath import backend

from infalign_jax.data import Pair
from infalign_jax.hh import HHConfig, read, split

REAL = Path(__file__).parents[2] / "shared" / "data" / "hh"
HI = "\n\nHuman: Hi\n\nAssistant:"
TWO_TURNS = HI + " Hello.\n\nHuman: Who?\n\nAssistant:"


def row(chosen, rejected):
    return json.dumps({"chosen": chosen, "rejected": rejected})


GOOD = row(HI + " Hello.", HI + " What?")


def config_of(tmp_path, lines, file="pairs.jsonl"):
    data = b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(gzip.compress(data) if file.endswith(".gz") else data)
    return HHConfig(str(tmp_path), file=file)


def test_the_prompt_ends_with_the_last_assistant_turn(tmp_path):
    lines = [GOOD, row(TWO_TURNS + " Me.", TWO_TURNS + " You,\n\nand me.")]
    pairs, counts = read(config_of(tmp_path, lines))
    assert pairs == [
        Pair(HI, " Hello.", " What?"),
        Pair(TWO_TURNS, " Me.", " You,\n\nand me."),
    ]
    assert (counts["rows"], counts["kept"]) == (2, 2)


@pytest.mark.parametrize("file", ["helpful-base/train.jsonl.gz", "pairs.jsonl"])
def test_packed_and_plain_files_in_any_folder(tmp_path, file):
    assert read(config_of(tmp_path, [GOOD] * 3, file))[1]["kept"] == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (row(HI + " a", TWO_TURNS + " b"), "different_prompts"),
        (row(HI + " a", HI), "empty_response"),
        (row(HI + " \n", HI + " b"), "empty_response"),
        (row("\n\nAssistant: a", "\n\nAssistant: b"), "empty_prompt"),
        (row("\n\nHuman: \n\nAssistant: a", "\n\nHuman: \n\nAssistant: b"), "empty_prompt"),
        (row("no turns", "at all"), "empty_prompt"),
    ],
)
def test_rows_that_compare_nothing_are_dropped_and_counted(tmp_path, line, reason):
    pairs, counts = read(config_of(tmp_path, [GOOD, line, GOOD]))
    assert len(pairs) == 2
    nothing = {"different_prompts": 0, "empty_prompt": 0, "empty_response": 0}
    assert counts == {"rows": 3, **nothing, "kept": 2} | {reason: 1}


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("{", "something else"),
        ("", "something else"),
        ("[" * 100_000, "something else"),
        ("[1]", "a list"),
        ('{"chosen": "a"}', "no 'rejected'"),
        ('{"chosen": "a", "rejected": 3}', "a int for 'rejected'"),
        (b'{"chosen": "\xff", "rejected": "a"}', "text that is not UTF-8"),
        ('{"chosen": "\\ud800", "rejected": "a"}', "text that is not UTF-8"),
    ],
)
@pytest.mark.parametrize("file", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, line, got, file):
    with pytest.raises(ValueError, match="expected an object") as caught:
        read(config_of(tmp_path, [GOOD, GOOD, line, GOOD], file))
    assert f"got {got} in {tmp_path / file}, line 3: repair" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_packing_is_named_by_file_and_line(tmp_path):
    config = config_of(tmp_path, [GOOD] * 2, "pairs.jsonl.gz")
    path = tmp_path / config.file
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"damaged gzip data .* in .*pairs\.jsonl\.gz, line \d"):
        read(config)
    path.write_bytes(GOOD.encode())
    with pytest.raises(ValueError, match=r"damaged gzip data .* line 1"):
        read(config)


@pytest.mark.parametrize("directory", ["", "no/such/place"])
def test_a_missing_directory(directory):
    with pytest.raises(ValueError, match=r"expected a directory of HH files, got .* set data\.dir"):
        read(HHConfig(directory))


def test_an_empty_directory(tmp_path):
    with pytest.raises(ValueError, match=r"got no \.jsonl file: put the downloaded files there"):
        read(HHConfig(str(tmp_path)))


def test_a_missing_file_is_answered_with_those_there_are(tmp_path):
    config_of(tmp_path, [GOOD], "harmless-base/test.jsonl.gz")
    with pytest.raises(ValueError, match=r"got harmless-base/test\.jsonl\.gz: set data\.file"):
        read(HHConfig(str(tmp_path)))


def test_a_file_without_lines(tmp_path):
    with pytest.raises(ValueError, match=r"expected preference pairs in .* got no line"):
        read(config_of(tmp_path, [], "pairs.jsonl.gz"))


def talks(count):
    return [Pair(f"\n\nHuman: What is {n}?\n\nAssistant:", " a", " b") for n in range(count)]


def test_splits_share_no_prompt_and_lose_none():
    pairs = talks(2000) * 2
    parts = split(pairs, HHConfig(judge_fraction=0.5))
    prompts = {name: {pair.prompt for pair in part} for name, part in parts.items()}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 2000
    assert sum(map(len, parts.values())) == len(pairs)


def test_splits_have_the_sizes_asked_for():
    config = HHConfig(validation_fraction=0.2, test_fraction=0.3, judge_fraction=0.2)
    sizes = {name: len(part) for name, part in split(talks(20_000), config).items()}
    expected = {"train": 8_000, "validation": 4_000, "test": 6_000, "judge": 2_000}
    assert sizes.keys() == expected.keys()
    assert all(abs(sizes[name] - size) < 300 for name, size in expected.items())


def test_a_split_hangs_on_its_prompt_alone():
    config = HHConfig()
    whole, part = split(talks(2000), config), split(reversed(talks(500)), config)
    for name, pairs in part.items():
        assert set(pairs) <= set(whole[name])


def test_a_conversation_stays_in_one_split():
    longer = [p._replace(prompt=p.prompt + " a\n\nHuman: And?\n\nAssistant:") for p in talks(500)]
    first, both = split(talks(500), HHConfig()), split(talks(500) + longer, HHConfig())
    assert {name: 2 * len(part) for name, part in first.items()} == {
        name: len(part) for name, part in both.items()
    }


def test_the_judge_takes_from_training_alone():
    without, with_judge = (
        split(talks(500), HHConfig()),
        split(talks(500), HHConfig(judge_fraction=0.4)),
    )
    assert without.keys() == {"train", "validation", "test"}
    assert with_judge["test"] == without["test"]
    assert {*with_judge["train"], *with_judge["judge"]} == {*without["train"]}


def test_a_split_left_empty_is_an_error_unless_nothing_was_asked_for():
    with pytest.raises(ValueError, match=r"expected pairs in every split, got none of 1 in "):
        split(talks(1), HHConfig())
    only = split(talks(1), HHConfig(validation_fraction=0.0, test_fraction=0.0))
    assert {name: len(part) for name, part in only.items()} == {"train": 1}


@pytest.mark.parametrize("field", ["validation_fraction", "test_fraction", "judge_fraction"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_fractions_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"expected 0 ≤ {field} < 1, got {value}"):
        HHConfig(**{field: value})


@pytest.mark.skipif(not REAL.is_dir(), reason="the real rows are not beside this checkout")
@pytest.mark.parametrize(
    ("file", "differing", "empty"),
    [("helpful-base.test.jsonl.gz", 9, 3), ("harmless-base.test.jsonl.gz", 4, 4)],
)
def test_real_rows(file, differing, empty):
    pairs, counts = read(HHConfig(str(REAL), file=file))
    dropped = {"different_prompts": differing, "empty_prompt": 0, "empty_response": empty}
    assert counts == {"rows": 2000, **dropped, "kept": 2000 - differing - empty}
    assert all(pair.prompt.endswith("\n\nAssistant:") for pair in pairs)
    parts = split(pairs, HHConfig(judge_fraction=0.5))
    assert min(map(len, parts.values())) > 100


class DefaultCredentialsError(Exception):
    """As google.auth names it."""


@pytest.fixture
def bucket(monkeypatch):
    """Sets what the file system of gs:// is, or what is raised when it is asked for."""
    cached = backend._FileSystemSpecBackend._get_filesystem
    cached.cache_clear()
    fsspec = pytest.importorskip("fsspec")  # etils brings it

    def is_there(files):
        def filesystem(name, **options):
            if isinstance(files, Exception):
                raise files
            return files

        monkeypatch.setattr(fsspec, "filesystem", filesystem)

    yield is_there
    cached.cache_clear()


def test_pairs_are_read_from_a_bucket(bucket):
    files = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem()
    bucket(files)
    files.pipe("gs://some/hh/pairs.jsonl", GOOD.encode())
    files.pipe("gs://some/hh/pairs.jsonl.gz", gzip.compress(GOOD.encode()))
    for file in ("pairs.jsonl", "pairs.jsonl.gz"):
        assert read(HHConfig("gs://some/hh", file=file))[0] == [Pair(HI, " Hello.", " What?")]
    with pytest.raises(ValueError, match=r"got 'gs://some/other': set data\.directory"):
        read(HHConfig("gs://some/other", file="pairs.jsonl"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ImportError("Please install gcsfs"),
            r"a package that reads gs://some/hh, got none \(Please install gcsfs\): install it",
        ),
        (
            DefaultCredentialsError("no credentials were found"),
            r"leave to read gs://some/hh, got DefaultCredentialsError: .*gcloud auth",
        ),
        (PermissionError("Forbidden"), "got PermissionError: Forbidden: log in"),
    ],
)
def test_a_bucket_that_cannot_be_read_is_told_with_a_remedy(bucket, error, line):
    bucket(error)
    with pytest.raises(ValueError, match=line):
        read(HHConfig("gs://some/hh", file="pairs.jsonl"))
