"""From preference pairs to arrays: the stages `tokenizer` and `data`."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from infalign_jax import data, hh, store, synthetic
from infalign_jax.batches import Preferences, Prompts
from infalign_jax.data import Pair
from infalign_jax.experiment import Experiment
from infalign_jax.lm import tokenizer as tokenizers
from infalign_jax.lm.tokenizer import Tokenizer, TokenizerConfig
from infalign_jax.runtime import digests, hosts
from infalign_jax.runtime.files import write_bytes
from infalign_jax.stages.run import Run, say
from infalign_jax.synthetic import SyntheticConfig

SPLITS = ("train", "judge", "validation", "test")


class Text(NamedTuple):
    """The data of a run, in text and in arrays.

    >>> Text._fields
    ('tokenizer', 'pairs', 'rows', 'counts', 'digest')
    """

    tokenizer: Tokenizer
    pairs: dict[str, list[Pair]]  # by split
    rows: dict[str, Preferences]  # by split, NumPy arrays
    counts: dict[str, Any]
    digest: str


def load(run: Run) -> Text:
    """Both stages: pairs stored by TFDS, a tokenizer trained on the training split, arrays.

    Each is kept under a digest of what it depends on, and reused where it is there. Says on
    standard error what had to be dropped or cut. Raises ValueError as the readers of data do, and
    where a tokenizer from a file has another vocabulary than the model.

    >>> import tempfile
    >>> few = SyntheticConfig(train_pairs=40, judge_pairs=4, validation_pairs=4, test_pairs=4)
    >>> run = Run(Experiment("few", data=few, prompt_length=24), Path(tempfile.mkdtemp()), None)
    >>> text = load(run)
    >>> text.rows["train"].responses.tokens.shape, text.counts["train"]["kept"]
    ((40, 2, 16), 40)
    """
    experiment = run.experiment
    pairs, counts, directory = _pairs(run)
    file = experiment.tokenizer.file
    digest = digests.digest(
        "text", experiment.data, experiment.tokenizer, directory.name, experiment.prompt_length,
        experiment.sampling.length, *([] if file is None else [tokenizers.load(file)]),
    )  # fmt: skip
    tokenizer = _tokenizer(run, pairs["train"], digest)
    rows = {}
    for split in SPLITS:
        rows[split], counts[split] = data.encode(
            pairs[split], tokenizer, experiment.prompt_length, experiment.sampling.length
        )
        _say_losses(split, counts[split])
    return Text(tokenizer, pairs, rows, counts, digest)


def _say_losses(split: str, counts: dict[str, int]) -> None:
    names = ("empty_rows", "long_prompt_rows", "long_response_rows", "cut_responses")
    if lost := [f"{name.replace('_', ' ')} {counts[name]}" for name in names if counts[name]]:
        say(f"data  {split}: {counts['kept']} of {counts['rows']} rows kept; {', '.join(lost)}")


def _pairs(run: Run) -> tuple[dict[str, list[Pair]], dict[str, Any], Path]:
    """Pairs by split, read back from the data set they were written to."""
    name, counts = hosts.shared(lambda: _kept_pairs(run))
    directory = run.out / "data" / name
    return {split: store.read(directory, split) for split in SPLITS}, counts, directory


def _kept_pairs(run: Run) -> tuple[str, dict[str, Any]]:
    """Writes the pairs where they are not there yet: their directory's name, and counts."""
    config = run.experiment.data
    counts: dict[str, Any] = {}
    match config:
        case SyntheticConfig():
            source = digests.digest("pairs", config)
            directory = run.out / "data" / source
            splits: Any = None if store.written(directory) else synthetic.pairs(config)
        case hh.HHConfig():
            found, counts["read"] = hh.read(config)
            source = digests.digest("pairs", config, [list(pair) for pair in found])
            directory = run.out / "data" / source
            splits = hh.split(found, config)
    if splits is None:
        say(f"data  reused from {directory}")
    else:
        store.write(splits, directory)
    return directory.name, counts


def _tokenizer(run: Run, pairs: list[Pair], digest: str) -> Tokenizer:
    path = run.out / "stages" / f"tokenizer-{digest}.model"
    hosts.shared(lambda: _build(run.experiment.tokenizer, pairs, path))
    return Tokenizer(tokenizers.load(path))


def _build(config: TokenizerConfig, pairs: list[Pair], path: Path) -> None:
    """Trains a tokenizer, or reads the configuration's file, where `path` is not there yet."""
    if path.exists():
        say(f"tokenizer  reused from {path}")
        return
    texts = [text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
    model = tokenizers.build(texts, config)
    tokenizer = Tokenizer(model)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size: expected the {tokenizer.vocab_size} pieces of {config.file}, "
            f"got {config.vocab_size}; set tokenizer.vocab_size and model.vocab_size to it"
        )
    write_bytes(path, model)


def check_rows(text: Text, experiment: Experiment) -> None:
    """Raises ValueError where a batch is larger than the rows or prompts that there are for it.

    >>> import numpy as np
    >>> rows = {"train": Prompts(np.zeros((5, 2)), np.zeros((5, 2)), np.arange(5))}
    >>> check_rows(Text(None, {}, rows, {}, ""), Experiment("quick"))
    Traceback (most recent call last):
    ValueError: sft.batch_size: expected at most 5 (the rows of train), got 128; lower it or give \
more pairs
    """
    for split in ("train", "judge"):
        there = len(jax.tree.leaves(text.rows[split])[0])
        for name, fit in (("sft", experiment.sft), ("reward", experiment.reward)):
            _check_batch(f"{name}.batch_size", fit.batch_size, there, f"rows of {split}")
    there = len(prompts_of(text, experiment, "train", experiment.calibrate.prompts)[0])
    _check_batch("align.batch_size", experiment.align.batch_size, there, "prompts of train")
    if experiment.foresight.steps:
        size = experiment.foresight.batch_size
        _check_batch("foresight.batch_size", size, there, "prompts of train")
    there = len(prompts_of(text, experiment, "test", experiment.evaluate.prompts)[0])
    if there < 2:
        raise ValueError(
            f"evaluate.prompts: expected at least 2 prompts of test, got {there}; give more pairs"
        )
    if there < experiment.evaluate.prompts:
        say(f"evaluate  only {there} prompts, which is all there are in test")


def _check_batch(name: str, size: int, there: int, of: str) -> None:
    if size > there:
        raise ValueError(
            f"{name}: expected at most {there} (the {of}), got {size}; lower it or give more pairs"
        )


def prompts_of(
    text: Text, experiment: Experiment, split: str, most: int
) -> tuple[list[str], Prompts]:
    """Up to `most` distinct prompts of a split that are short enough, as texts and arrays.

    >>> model = tokenizers.train(["ab ab"], tokenizers.TokenizerConfig(264, symbols=()))
    >>> pairs = {"test": [Pair(prompt, "a", "b") for prompt in ("ab", "ab ab ab ab", "ab", "b")]}
    >>> text = Text(Tokenizer(model), pairs, {}, {}, "")
    >>> texts, prompts = prompts_of(text, Experiment("quick", prompt_length=3), "test", 9)
    >>> texts, prompts.tokens.shape
    (['ab', 'b'], (2, 3))
    """
    length = experiment.prompt_length
    every, _ = data.encode_prompts(
        (pair.prompt for pair in text.pairs[split]), text.tokenizer, length
    )
    kept = [
        prompt
        for prompt in dict.fromkeys(pair.prompt for pair in text.pairs[split])
        if prompt.strip() and len(text.tokenizer.encode(prompt)) + 1 <= length
    ]
    most = min(most, len(kept))
    return kept[:most], jax.tree.map(lambda leaf: leaf[:most], every)
