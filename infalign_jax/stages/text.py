"""From preference pairs to arrays: the stages `tokenizer` and `data`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from infalign_jax import data, hh, store, synthetic
from infalign_jax.batches import Preferences, Prompts
from infalign_jax.data import Pair
from infalign_jax.experiment import Experiment
from infalign_jax.lm import tokenizer as tokenizers
from infalign_jax.lm.tokenizer import Tokenizer
from infalign_jax.runtime import checkpoint
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

    Each is kept under a digest of what it depends on, and reused where it is there.

    >>> load.__name__
    'load'
    """
    experiment = run.experiment
    pairs, counts, directory = _pairs(run)
    digest = checkpoint.digest(
        "text", experiment.data, experiment.tokenizer, directory.name, experiment.prompt_length,
        experiment.sampling.length,
    )  # fmt: skip
    tokenizer = _tokenizer(run, pairs["train"], digest)
    rows = {}
    for split in SPLITS:
        rows[split], counts[split] = data.encode(
            pairs[split], tokenizer, experiment.prompt_length, experiment.sampling.length
        )
    return Text(tokenizer, pairs, rows, counts, digest)


def _pairs(run: Run) -> tuple[dict[str, list[Pair]], dict[str, Any], Path]:
    """Pairs by split, read back from the data set they were written to."""
    config = run.experiment.data
    counts: dict[str, Any] = {}
    match config:
        case SyntheticConfig():
            source = checkpoint.digest("pairs", config)
            directory = run.out / "data" / source
            splits: Any = None if directory.exists() else synthetic.pairs(config)
        case hh.HHConfig():
            found, dropped = hh.read(config)
            counts["read"] = dropped
            source = checkpoint.digest("pairs", config, [list(pair) for pair in found])
            directory = run.out / "data" / source
            splits = hh.split(found, config)
    if splits is not None:
        store.write(splits, directory)
    return {split: store.read(directory, split) for split in SPLITS}, counts, directory


def _tokenizer(run: Run, pairs: list[Pair], digest: str) -> Tokenizer:
    path = run.out / "stages" / f"tokenizer-{digest}.model"
    if path.exists():
        say(f"tokenizer  reused from {path}")
        return Tokenizer(tokenizers.load(path))
    texts = [text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
    model = tokenizers.build(texts, run.experiment.tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, model)
    return Tokenizer(model)


def prompts_of(text: Text, experiment: Experiment, split: str, most: int) -> tuple[list[str], Prompts]:
    """Up to `most` distinct prompts of a split that are short enough, as texts and arrays.

    >>> prompts_of.__name__
    'prompts_of'
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
    return kept[:most], Prompts(every.tokens[:most], every.mask[:most], every.index[:most])
