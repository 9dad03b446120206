"""Anthropic's HH preference pairs, from the JSON-lines files in which they are published.

One object a line, `{"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": …}`. The prompt is
everything up to and including the last "\\n\\nAssistant:", the response is the rest. Bai et al.
2022, arXiv 2204.05862.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infalign_jax.data import Pair

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class HHConfig:
    """Where the pairs are and how they are divided; fractions are of the conversations.

    >>> HHConfig(test_fraction=0.5, validation_fraction=0.5)
    Traceback (most recent call last):
    ValueError: expected validation_fraction + test_fraction below 1, got 1.0: lower one of them
    """

    directory: str = ""  # or a bucket's, gs://…
    file: str = "helpful-base/train.jsonl.gz"  # below directory; .gz or plain
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    judge_fraction: float = 0.0  # of what is left: pairs for a judge that training never sees

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "test_fraction", "judge_fraction"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"expected 0 ≤ {name} < 1, got {value}: set data.{name}")
        held_out = self.validation_fraction + self.test_fraction
        if held_out >= 1:
            raise ValueError(
                f"expected validation_fraction + test_fraction below 1, got {held_out}: "
                "lower one of them"
            )


def read(config: HHConfig) -> tuple[list[Pair], dict[str, int]]:
    r"""Read the pairs of one file, with the number of rows, kept and dropped by reason.

    Dropped are rows whose two prompts differ, whose prompt says nothing, or one of whose responses
    is empty. Raises ValueError for a directory or file that is missing or empty, and for a line
    that is malformed, with file and line number.

    >>> import json, pathlib, tempfile
    >>> hi = "\n\nHuman: Hi\n\nAssistant:"
    >>> row = {"chosen": hi + " Hello.", "rejected": hi}
    >>> directory = tempfile.mkdtemp()
    >>> _ = pathlib.Path(directory, "hi.jsonl").write_text(json.dumps(row))
    >>> read(HHConfig(directory, file="hi.jsonl"))[1]
    {'rows': 1, 'different_prompts': 0, 'empty_prompt': 0, 'empty_response': 1, 'kept': 0}
    """
    path = _find(config)
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for chosen, rejected in _rows(path):
        prompt, turn, best = chosen.rpartition(ASSISTANT)
        other_prompt, _, worst = rejected.rpartition(ASSISTANT)
        if prompt != other_prompt:
            dropped["different_prompts"] += 1
        elif not prompt.replace(HUMAN, "").replace(ASSISTANT, "").strip():
            dropped["empty_prompt"] += 1
        elif not best.strip() or not worst.strip():
            dropped["empty_response"] += 1
        else:
            pairs.append(Pair(prompt + turn, best, worst))
    rows = len(pairs) + dropped.total()
    if not rows:
        raise ValueError(f"expected preference pairs in {path}, got no line: set data.file")
    reasons = ("different_prompts", "empty_prompt", "empty_response")
    return pairs, {"rows": rows} | {r: dropped[r] for r in reasons} | {"kept": len(pairs)}


def _find(config: HHConfig) -> Path:
    directory = _place(config.directory)
    with _reached(config.directory):
        path = directory / config.file
        if not config.directory or not directory.is_dir():
            raise ValueError(
                f"expected a directory of HH files, got {config.directory!r}: set data.directory "
                "to the place of the downloaded files"
            )
        if not path.is_file():
            there = sorted(str(p.relative_to(directory)) for p in directory.rglob("*.jsonl*"))
            got = ", ".join(there[:8]) or "no .jsonl file"
            advice = "set data.file to one of them" if there else "put the downloaded files there"
            raise ValueError(f"expected {config.file} in {directory}, got {got}: {advice}")
        return path


def _place(directory: str) -> Path:
    """A directory, or a bucket's by the name TFDS gives it."""
    if "://" not in directory:
        return Path(directory)
    from etils import epath

    return epath.Path(directory)  # type: ignore[no-any-return]


@contextmanager
def _reached(directory: str) -> Iterator[None]:
    """What its client raises of a bucket, as a line that says what to do."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"expected a package that reads {directory}, got none ({error}): install it (pip "
            "install gcsfs for gs://) or set data.directory to a copy of the files"
        ) from None
    except Exception as error:
        if "://" not in directory or isinstance(error, ValueError):
            raise
        raise ValueError(
            f"expected leave to read {directory}, got {type(error).__name__}: {error}: log in "
            "(gcloud auth application-default login) or set data.directory to a copy of the files"
        ) from None


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """The two texts of every line."""
    number = 0
    with _reached(str(path)):
        file = io.BytesIO(path.read_bytes())
    try:
        with gzip.open(file) if path.suffix == ".gz" else file as lines:
            for line in lines:
                number += 1
                yield _texts(line)
            return
    except UnicodeError:
        why = "text that is not UTF-8"
    except (json.JSONDecodeError, RecursionError):
        why = "something else"
    except (TypeError, KeyError) as error:
        why = str(error.args[0])
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        number, why = number + 1, f"damaged gzip data ({error})"
    raise ValueError(
        f'expected an object {{"chosen": text, "rejected": text}}, got {why} in {path}, line '
        f"{number}: repair or download it again"
    )


def _texts(line: bytes) -> tuple[str, str]:
    row = json.loads(line.decode())
    if not isinstance(row, dict):
        raise TypeError(f"a {type(row).__name__}")
    for name in ("chosen", "rejected"):
        if name not in row:
            raise KeyError(f"no {name!r}")
        if not isinstance(row[name], str):
            raise TypeError(f"a {type(row[name]).__name__} for {name!r}")
        row[name].encode()  # an unpaired surrogate, which JSON can write, is no text
    return row["chosen"], row["rejected"]


def split(pairs: Iterable[Pair], config: HHConfig) -> dict[str, list[Pair]]:
    r"""Divide pairs into train, validation, test and, where `judge_fraction` asks for it, judge.

    The split hangs on a hash of the prompt's opening (its first turn) alone: not on the file, the
    order or the other pairs. So a prompt, and every conversation it continues, is in one split
    only: a longer prompt quotes an answer to the shorter one. Raises ValueError where a split that
    was asked for stays empty.

    >>> ask = "\n\nHuman: What is {}?\n\nAssistant:"
    >>> pairs = [Pair(ask.format(n), " This.", " That.") for n in range(99)]
    >>> {name: len(part) for name, part in split(pairs, HHConfig(judge_fraction=0.5)).items()}
    {'train': 39, 'validation': 10, 'test': 10, 'judge': 40}
    """
    shares = {"validation": config.validation_fraction, "test": config.test_fraction}
    left = 1 - sum(shares.values())
    shares = {"train": left * (1 - config.judge_fraction)} | shares
    if config.judge_fraction:
        shares["judge"] = left * config.judge_fraction
    parts: dict[str, list[Pair]] = {name: [] for name, share in shares.items() if share}
    for pair in pairs:
        parts[_part(pair.prompt, config)].append(pair)
    if empty := [name for name, part in parts.items() if not part]:
        total = sum(map(len, parts.values()))
        raise ValueError(
            f"expected pairs in every split, got none of {total} in {', '.join(empty)}: give more "
            "pairs, or set data.validation_fraction, test_fraction and judge_fraction"
        )
    return parts


def _part(prompt: str, config: HHConfig) -> str:
    digest = hashlib.sha256(prompt.split(ASSISTANT)[0].encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 8]) / 2**64 for i in (0, 8))
    if first < config.test_fraction:
        return "test"
    if first < config.test_fraction + config.validation_fraction:
        return "validation"
    return "judge" if second < config.judge_fraction else "train"
