"""A calibration table: each prompt's sorted reference rewards, in one file, looked up in place.

The rewards of K responses of the reference policy to each of B prompts are all that calibration
needs to know (*InfAlign*, arXiv 2412.19792, section 4.1). They are sampled once; any trainer, in
any language, may then rank new responses among them.

Format, version 1. Integers and floats are little-endian; nothing lies between the parts.

=================  =================================================================================
8 bytes            89 49 41 54 0d 0a 1a 0a ("\\x89IAT\\r\\n\\x1a\\n")
uint32             the format's version, 1
uint32             H, the length of the header; 32 + H is a multiple of 64
16 bytes           BLAKE2b-128 of the header
H bytes            the header: a JSON object in UTF-8, filled up with spaces at its end
16·B bytes         BLAKE2b-128 of each prompt's text in UTF-8, in increasing order as bytes
4·K·B bytes        float32, the K rewards of each of these prompts in turn, in increasing order
=================  =================================================================================

The header has ``prompts`` (B), ``responses`` (K), ``prompts_digest`` and ``rewards_digest``
(BLAKE2b-256 of the last two parts, in hexadecimal) and ``about``, an object that says what made the
rewards; ``write`` adds to it the time and the libraries' versions. BLAKE2b is that of RFC 7693,
without key, salt or personalisation, at a digest length of 16 or 32 bytes.

The text of a prompt: a string is its own. Anything else, such as a list of chat messages, is its
JSON with keys sorted by code point, no space between tokens, characters beyond ASCII written as
they are, and fields that are null left out (columnar files add them).
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from infalign_jax import __version__
from infalign_jax.runtime import files

Prompt = str | int | np.integer[Any] | Sequence[Mapping[str, Any]]  # text, its number, or a chat

_MAGIC, _VERSION = b"\x89IAT\r\n\x1a\n", 1
_PREFIX = struct.Struct("<8sII16s")  # 32 bytes
_HASH, _REWARD = np.dtype("S16"), np.dtype("<f4")


class Table(NamedTuple):
    """An open table; its arrays lie in the file and are read where they are looked at.

    >>> Table._fields
    ('hashes', 'rewards', 'about')
    """

    hashes: np.ndarray  # S16[B], increasing: BLAKE2b-128 of the prompts' texts
    rewards: np.ndarray  # float32[B, K], each row in ascending order
    about: dict[str, Any]  # what made the rewards


def prompt_text(prompt: Prompt) -> str:
    """The text by which a prompt is known: its own, or its JSON where it is no string.

    Raises ValueError where it is neither a string, an integer nor a list of chat messages, or
    cannot be written as UTF-8.

    >>> prompt_text("Why is the sky blue?")
    'Why is the sky blue?'
    >>> prompt_text([{"role": "user", "content": "Why?", "name": None}])
    '[{"content":"Why?","role":"user"}]'
    """
    plain: Any = int(prompt) if isinstance(prompt, np.integer) else _without_nulls(prompt)
    if isinstance(plain, bool) or not isinstance(plain, str | int | list):
        raise ValueError(
            f"expected a prompt that is a string, an integer or a list of messages, got "
            f"{plain!r:.60}: give each prompt as the trainer has it"
        )
    try:
        text = plain if isinstance(plain, str) else _compact(plain)
        text.encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise ValueError(
            f"expected a prompt of JSON's types and valid characters, got {plain!r:.60} "
            f"({error}): mend it"
        ) from None
    return text


def write(
    path: str | Path, prompts: Sequence[Prompt], rewards: ArrayLike, about: Mapping[str, Any]
) -> None:
    """Writes a table, whole or not at all, in place of one that is there.

    Args:
      path: the file.
      prompts: B distinct prompts.
      rewards: float[B, K], K reference rewards a prompt in any order, stored as float32: what is
        calibrated by the table is to be rounded to float32 too, or ties are lost.
      about: what made the rewards, as JSON: the reward model and its digest, the policy, the
        sampling law. Joined to ``created`` (UTC) and ``libraries`` unless it has these.

    Raises ValueError where shapes do not fit, a reward is not finite in float32, two prompts are
    the same or hash alike, or ``about`` is no JSON; OSError when the disk is full.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "reference.table")
    >>> write(path, ["a", "b"], [[2.0, 1.0], [0.5, 0.5]], {"reward_model": "rm-1"})
    >>> load(path).about["reward_model"]
    'rm-1'
    """
    texts = [prompt_text(prompt) for prompt in prompts]
    rows = _checked(rewards, texts)
    hashes = _hashes(texts)
    order = np.argsort(hashes, kind="stable")
    hashes, rows = hashes[order], np.sort(rows[order], axis=1)
    if (same := np.flatnonzero(hashes[1:] == hashes[:-1])).size:
        one, other = (texts[order[same[0] + i]] for i in range(2))
        raise ValueError(
            f"expected distinct prompts, got {one!r:.60} twice: join their rewards in one row"
            if one == other
            else f"expected prompts of distinct hashes, got {one!r:.60} and {other!r:.60}: "
            "change one of them"
        )
    made = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "libraries": _libraries()}
    header = {
        "prompts": len(texts),
        "responses": rows.shape[1],
        "prompts_digest": _digest(hashes),
        "rewards_digest": _digest(rows),
        "about": made | dict(about),
    }
    try:
        packed = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected `about` to be JSON, got {dict(about)!r:.60} ({error}): "
            "give strings, finite numbers, lists and dictionaries of these"
        ) from None
    packed += b" " * (-(_PREFIX.size + len(packed)) % 64)
    prefix = _PREFIX.pack(_MAGIC, _VERSION, len(packed), _hash(packed))
    files.write_bytes(Path(path), prefix, packed, hashes.data, rows.data)


def load(path: str | Path, *, verify: bool = False) -> Table:
    """Opens a table that ``write`` wrote: reads the header, and of the rest what is looked up.

    With ``verify`` all of it is read once: the digests and the order of prompts and rewards.

    Raises ValueError where the file is no table, of a newer version, cut short or damaged; OSError
    where it cannot be read.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "reference.table")
    >>> write(path, ["a", "b"], [[2.0, 1.0], [0.5, 0.5]], {})
    >>> load(path, verify=True).rewards.shape
    (2, 2)
    """
    header, begin = _header(Path(path))
    shape = header["prompts"], header["responses"]
    expected = begin + shape[0] * (_HASH.itemsize + shape[1] * _REWARD.itemsize)
    if (size := Path(path).stat().st_size) != expected:
        raise _damaged(path, f"{expected} bytes, got {size}")
    whole = np.asarray(np.memmap(path, np.uint8, mode="r"))
    end = begin + shape[0] * _HASH.itemsize
    hashes, rewards = whole[begin:end].view(_HASH), whole[end:].view(_REWARD).reshape(shape)
    if verify:
        for name, part in (("prompts", hashes), ("rewards", rewards)):
            if _digest(part) != header[f"{name}_digest"]:
                raise _damaged(path, f"{name} of the digest in the header, got another")
        rising = np.all(hashes[1:] > hashes[:-1]) and np.all(rewards[:, 1:] >= rewards[:, :-1])
        if not (rising and np.all(np.isfinite(rewards[:, [0, -1]]))):
            raise _damaged(path, "prompts and finite rewards in increasing order, got others")
    return Table(hashes, rewards, header["about"])


def find(table: Table, prompts: Iterable[Prompt]) -> np.ndarray:
    """The row of each prompt, int64[n], −1 where the table lacks it: a binary search each.

    >>> find(Table(_hashes(["a"]), np.zeros((1, 4), np.float32), {}), ["b", "a"]).tolist()
    [-1, 0]
    """
    wanted = _hashes([prompt_text(prompt) for prompt in prompts])
    rows = np.minimum(np.searchsorted(table.hashes, wanted), len(table.hashes) - 1)
    return np.where(table.hashes[rows] == wanted, rows, -1)


def look_up(table: Table, prompts: Sequence[Prompt]) -> np.ndarray:
    """The sorted reference rewards of each prompt, float32[n, K], copied from the file.

    Round rewards to float32 before they are ranked among these, or ties are lost.

    Raises ValueError that names the first prompt the table lacks.

    >>> table = Table(_hashes(["a"]), np.array([[1.0, 2.0]], np.float32), {})
    >>> look_up(table, ["a", "a"]).tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """
    rows = find(table, prompts)
    if (missing := np.flatnonzero(rows < 0)).size:
        raise ValueError(
            f"expected prompts of the calibration table, got "
            f"{prompt_text(prompts[missing[0]])!r:.60} ({missing.size} of {len(rows)} are not in "
            "it): score reference responses to them and write the table anew"
        )
    return table.rewards[rows]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _checked(rewards: ArrayLike, texts: Sequence[str]) -> np.ndarray:
    with np.errstate(over="ignore"):  # what float32 cannot hold is found below
        rows = np.asarray(rewards).astype(_REWARD)
    if rows.ndim != 2 or len(rows) != len(texts) or rows.size == 0:
        raise ValueError(
            f"expected rewards of shape [{len(texts)}, K], one row a prompt and at least one, "
            f"got {rows.shape}: give K rewards of each prompt"
        )
    if not np.all(np.isfinite(rows)):
        prompt, response = np.argwhere(~np.isfinite(rows))[0]
        raise ValueError(
            f"expected rewards that are finite in float32, got {rows[prompt, response]} at prompt "
            f"{texts[prompt]!r:.60}, response {response}: find out why the reward model gave it"
        )
    return rows


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_HASH.itemsize).digest()


def _hashes(texts: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"".join([_hash(text.encode()) for text in texts]), _HASH)


def _digest(part: np.ndarray) -> str:
    return hashlib.blake2b(part.view(np.uint8).data, digest_size=32).hexdigest()


def _libraries() -> dict[str, str]:
    return {"infalign-jax": __version__, "jax": jax.__version__, "numpy": np.__version__}


def _damaged(path: str | Path, what: str) -> ValueError:
    return ValueError(f"{path}: expected {what}: the file is damaged; copy or write it anew")


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and where the prompts' hashes begin."""
    with open(path, "rb") as file:
        prefix = file.read(_PREFIX.size)
        if not prefix.startswith(_MAGIC):
            raise ValueError(
                f"{path}: expected a calibration table, got a file that begins with "
                f"{prefix[:8]!r}: name one that tables.write wrote"
            )
        if len(prefix) < _PREFIX.size:
            raise _damaged(path, f"{_PREFIX.size} bytes before the header, got {len(prefix)}")
        _, version, length, digest = _PREFIX.unpack(prefix)
        if version != _VERSION:
            raise ValueError(
                f"{path}: expected a table of version {_VERSION}, got {version}: "
                "upgrade infalign-jax, or write the table with this one"
            )
        if _hash(packed := file.read(length)) != digest:
            raise _damaged(path, "a header of the digest before it, got another")
    try:
        header = json.loads(packed)
    except ValueError:
        header = None
    match header:
        case {
            "prompts": int(prompts),
            "responses": int(responses),
            "prompts_digest": str(),
            "rewards_digest": str(),
            "about": dict(),
        } if prompts > 0 and responses > 0:
            return header, _PREFIX.size + length
    raise _damaged(path, "the fields of tables.py in the header, got others")
