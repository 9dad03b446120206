"""Preference pairs on disk: a TFDS data set of array_record files, with no TensorFlow."""

import contextlib
import hashlib
import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infalign_jax.data import Pair

# TFDS is imported where it is used: it takes longer to import than all the rest here.

NAME, VERSION = "preference_pairs", "1.0.0"


def write(splits: Mapping[str, Iterable[Pair]], directory: str | Path) -> None:
    r"""Store pairs by split as a TFDS data set of array_record files below `directory`.

    Written whole or not at all; where the same pairs are stored already, nothing is done. Raises
    ValueError for a split without pairs, a prompt in two splits, or a directory that holds other
    pairs; OSError where the disk is full.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> write({"train": [Pair("a", "b", "c")], "test": [Pair("d", "e", "f")]}, directory)
    >>> read(directory, "train")
    [Pair(prompt='a', chosen='b', rejected='c')]
    """
    rows = {name: list(pairs) for name, pairs in splits.items()}
    _check(rows)
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    place = Path(directory, NAME)
    if written(directory):
        if _stored(directory).info.metadata != {"digest": digest}:
            raise ValueError(
                f"expected no other data set in {directory}, got one of other pairs: "
                "choose another directory or remove that one"
            )
        return
    for leftover in place.glob("incomplete.*"):  # of a process that was killed
        shutil.rmtree(leftover)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _builder(rows, digest, directory).download_and_prepare()
    except RuntimeError as error:  # array_record reports the system's errors so
        if isinstance(error.__cause__, UnicodeError):
            raise
        raise OSError(
            f"expected room for the preference pairs in {directory}, got {error}; free some space "
            "or choose another directory, and run again"
        ) from error


def written(directory: str | Path) -> bool:
    """Whether `directory` holds stored pairs, whole.

    >>> written("no/such/place")
    False
    """
    return Path(directory, NAME, VERSION).is_dir()


def _check(rows: Mapping[str, Sequence[Pair]]) -> None:
    split_of: dict[str, str] = {}
    for name, pairs in rows.items():
        if not pairs:
            raise ValueError(f"expected pairs in every split, got none in {name}: check the data")
        for pair in pairs:
            if (other := split_of.setdefault(pair.prompt, name)) != name:
                raise ValueError(
                    f"expected every prompt in one split, got {pair.prompt[:40]!r} in {other} and "
                    f"{name}: divide the pairs by their prompts"
                )


def _builder(rows: Mapping[str, Sequence[Pair]], digest: str, directory: str | Path) -> Any:
    import tensorflow_datasets as tfds

    class PreferencePairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = NAME
        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Preference pairs.",
                features=tfds.features.FeaturesDict(
                    {field: tfds.features.Text() for field in Pair._fields}
                ),
                metadata=tfds.core.MetadataDict(digest=digest),
                disable_shuffling=True,  # keys are numbers: the order written is the order read
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {name: self._generate_examples(name) for name in rows}

        def _generate_examples(self, name: str) -> Any:
            return ((i, pair._asdict()) for i, pair in enumerate(rows[name]))

    tfds.disable_progress_bar()
    return PreferencePairs(data_dir=str(directory), file_format="array_record")


def _stored(directory: str | Path) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(Path(directory, NAME, VERSION)))


def read(directory: str | Path, split: str) -> list[Pair]:
    r"""The pairs of a split that `write` stored, in the order they were written.

    Raises ValueError where `directory` holds no stored pairs or none of that split.

    >>> read("no/such/place", "train")
    Traceback (most recent call last):
    ValueError: expected stored pairs in no/such/place, got none: write them first
    """
    if not written(directory):
        raise ValueError(f"expected stored pairs in {directory}, got none: write them first")
    stored = _stored(directory)
    if split not in stored.info.splits:
        there = ", ".join(stored.info.splits)
        raise ValueError(
            f"expected the split {split!r} in {directory}, got only {there}: name one of these"
        )
    source = stored.as_data_source(split)
    return [Pair(*(row[field].decode() for field in Pair._fields)) for row in source]
