"""Preference pairs as arrays: encoded, padded, and dealt out in batches by Grain."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np

from infalign_jax.batches import Preferences, Prompts, Responses
from infalign_jax.lm.tokenizer import BOS, EOS, PAD, Tokenizer

if TYPE_CHECKING:
    import grain

Rows = TypeVar("Rows")
Rule = Literal["cut", "drop", "error"]


class Pair(NamedTuple):
    """Two responses to a prompt, one preferred. Prompt + response is the whole text.

    >>> Pair("\\n\\nHuman: Hi\\n\\nAssistant:", " Hello.", " What?").chosen
    ' Hello.'
    """

    prompt: str
    chosen: str
    rejected: str


def _check_rule(name: str, rule: str, rules: tuple[str, ...]) -> None:
    if rule not in rules:
        raise ValueError(f"expected {name} to be one of {rules}, got {rule!r}: set {name}")


def _too_long(what: str, tokens: int, limit: int, option: str) -> ValueError:
    return ValueError(
        f"expected {what} of at most {limit} tokens, got one of {tokens}: raise {option}_length or "
        f'set long_{option}s="drop"'
    )


def _encode_prompts(
    texts: Iterable[str], tokenizer: Tokenizer, length: int, rule: Literal["drop", "error"]
) -> tuple[Prompts, dict[str, int], dict[str, int]]:
    """The distinct prompts that are kept, the number of each text among them, and counts."""
    _check_rule("long_prompts", rule, ("drop", "error"))
    kept: dict[str, list[int]] = {}
    counts = {"prompts": 0, "empty_prompts": 0, "long_prompts": 0}
    for text in dict.fromkeys(texts):
        counts["prompts"] += 1
        tokens = [BOS, *tokenizer.encode(text)]
        if not text.strip():
            counts["empty_prompts"] += 1
        elif len(tokens) <= length:
            kept[text] = tokens
        elif rule == "drop":
            counts["long_prompts"] += 1
        else:
            raise _too_long("prompts", len(tokens), length, "prompt")
    if not kept:
        raise ValueError(
            f"expected prompts of at most {length} tokens, got none among {counts['prompts']}: "
            "raise prompt_length"
        )
    index: Any = np.arange(len(kept), dtype=np.int32)
    prompts = Prompts(*_pad(list(kept.values()), length, left=True), index)
    return prompts, {text: i for i, text in enumerate(kept)}, counts


def _pad(rows: Sequence[Sequence[int]], length: int, *, left: bool) -> tuple[Any, Any]:
    tokens = np.full((len(rows), length), PAD, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for row, ids in enumerate(rows):
        place = slice(length - len(ids), None) if left else slice(len(ids))
        tokens[row, place] = ids
        mask[row, place] = True
    return tokens, mask


def encode_prompts(
    prompts: Iterable[str],
    tokenizer: Tokenizer,
    prompt_length: int,
    long_prompts: Literal["drop", "error"] = "drop",
) -> tuple[Prompts, dict[str, int]]:
    r"""Distinct prompts as NumPy arrays [B, P], right-aligned after BOS, numbered from 0 to B − 1.

    Repeated prompts count once, in order of appearance. Empty prompts are dropped; prompts of more
    than P = `prompt_length` tokens, BOS included, are dropped or refused by `long_prompts`. Counts:
    distinct `prompts`, those dropped as `empty_prompts` and `long_prompts`. Raises ValueError where
    none is left.

    >>> from infalign_jax.lm.tokenizer import TokenizerConfig, train
    >>> tokenizer = Tokenizer(train(["ab ab"], TokenizerConfig(vocab_size=264, symbols=())))
    >>> prompts, counts = encode_prompts(["ab", "a", "ab", "ab ab ab"], tokenizer, 4)
    >>> prompts.mask.sum(axis=1).tolist(), prompts.index.tolist(), counts["long_prompts"]
    ([2, 2], [0, 1], 1)
    """
    kept, _, counts = _encode_prompts(prompts, tokenizer, prompt_length, long_prompts)
    return kept, counts


def encode(
    pairs: Iterable[Pair],
    tokenizer: Tokenizer,
    prompt_length: int,
    response_length: int,
    long_prompts: Literal["drop", "error"] = "drop",
    long_responses: Rule = "cut",
) -> tuple[Preferences, dict[str, int]]:
    r"""Preference pairs as NumPy arrays: prompts [B, P] and responses [B, 2, T], chosen first.

    A prompt is BOS and its pieces, a response its pieces and EOS. Rows with an empty prompt or
    response are dropped, rows with a prompt of more than P tokens dropped or refused. A response
    of more than T tokens is cut to its first T, without EOS, or its row is dropped or refused.
    `prompts.index` numbers the distinct prompts as `encode_prompts` does on the same prompts.

    Counts: `rows` given and `kept`; rows dropped as `empty_rows`, `long_prompt_rows` and
    `long_response_rows`; responses that were cut, `cut_responses`; rows kept although the two
    responses are the same after cutting, `same_responses`. Raises ValueError where no row is left.

    >>> from infalign_jax.lm.tokenizer import TokenizerConfig, train
    >>> tokenizer = Tokenizer(train(["ab ab"], TokenizerConfig(vocab_size=264, symbols=())))
    >>> rows, counts = encode([Pair("ab", "ab", "a"), Pair("ab", " ", "a")], tokenizer, 4, 3)
    >>> rows.responses.mask.tolist(), counts["empty_rows"]
    ([[[True, True, False], [True, True, False]]], 1)
    """
    _check_rule("long_responses", long_responses, ("cut", "drop", "error"))
    pairs, length = list(pairs), response_length
    texts = (pair.prompt for pair in pairs)
    prompts, number, _ = _encode_prompts(texts, tokenizer, prompt_length, long_prompts)
    dropped = ("empty_rows", "long_prompt_rows", "long_response_rows")
    counts = dict.fromkeys(("rows", *dropped, "kept", "cut_responses", "same_responses"), 0)
    kept: list[int] = []
    responses: list[list[int]] = []
    for pair in pairs:
        counts["rows"] += 1
        if not all(text.strip() for text in pair):
            counts["empty_rows"] += 1
        elif pair.prompt not in number:
            counts["long_prompt_rows"] += 1
        elif two := _encode_responses(pair, tokenizer, length, long_responses, counts):
            kept.append(number[pair.prompt])
            responses += two
        else:
            counts["long_response_rows"] += 1
    if not kept:
        raise ValueError(f"expected a row that can be kept, got {counts}: raise the lengths")
    counts["kept"] = len(kept)
    tokens, mask = (x.reshape(-1, 2, length) for x in _pad(responses, length, left=False))
    return Preferences(_take(prompts, kept), Responses(tokens, mask)), counts


def _encode_responses(
    pair: Pair, tokenizer: Tokenizer, length: int, rule: Rule, counts: dict[str, int]
) -> list[list[int]]:
    """Tokens of both responses, none where the row is to be dropped; cuts are counted."""
    two = [[*tokenizer.encode(text), EOS] for text in (pair.chosen, pair.rejected)]
    longest = max(map(len, two))
    if longest > length and rule == "error":
        raise _too_long("responses", longest, length, "response")
    if longest > length and rule == "drop":
        return []
    counts["cut_responses"] += sum(len(ids) > length for ids in two)
    two = [ids[:length] for ids in two]
    counts["same_responses"] += two[0] == two[1]
    return two


def _take(rows: Rows, index: Sequence[int]) -> Rows:
    return jax.tree.map(lambda leaf: leaf[index], rows)


def minibatches(
    rows: Rows, batch_size: int, seed: int, own: np.ndarray | None = None
) -> "grain.DatasetIterator[Rows]":
    """Batches without end of a pytree of NumPy arrays that share their first axis.

    Every pass over the rows has an order of its own; a batch may span two passes. The batch of a
    step depends on (seed, step) alone; a host gets its `own` rows of it, by number
    (default: all). `get_state()`, a JSON dictionary, continues after the last batch given when
    a new iterator's `set_state` gets it. Raises ValueError for arrays of unequal length, a batch of
    more than all rows, or a seed outside [0, 2³²).

    >>> batches = minibatches({"x": np.arange(6)}, batch_size=3, seed=0)
    >>> sorted([*next(batches)["x"], *next(batches)["x"]]) == list(range(6))
    True
    >>> batches.get_state()
    {'next_index': 2}
    """
    import grain  # here, because it takes longer to import than the rest of this module

    lengths = sorted({len(leaf) for leaf in jax.tree.leaves(rows)})
    if len(lengths) != 1:
        raise ValueError(f"expected arrays of one length, got {lengths}: give rows of one data set")
    if not 1 <= batch_size <= lengths[0]:
        raise ValueError(
            f"expected 1 ≤ batch_size ≤ {lengths[0]} (the rows there are), got {batch_size}: "
            "set batch_size"
        )
    order = grain.MapDataset.range(lengths[0]).shuffle(seed).repeat().batch(batch_size)
    batches = order.map(lambda index: _take(rows, index if own is None else index[own]))
    # No thread reads ahead: one gather a step is cheap, and no thread is left to be closed.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
