"""SentencePiece tokens: byte-pair encoding with byte fallback, so that any text can be written.

No normalisation takes place: what is encoded and decoded again is the same text, spaces and
newlines included (the one exception is U+2581, which SentencePiece itself writes for a space).
"""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL_AND_BYTES = 4 + 256


@dataclass(frozen=True)
class TokenizerConfig:
    """What the tokenizer is to be.

    >>> TokenizerConfig(vocab_size=100)
    Traceback (most recent call last):
    ValueError: expected vocab_size above 262 (4 special tokens, 256 bytes, 2 symbols), got 100: \
raise tokenizer.vocab_size
    """

    vocab_size: int = 512
    symbols: tuple[str, ...] = ("\n\nHuman:", "\n\nAssistant:")  # each always one token
    file: str | None = None  # a SentencePiece model to load; None trains one on the data

    def __post_init__(self) -> None:
        if not all(self.symbols) or len(set(self.symbols)) < len(self.symbols):
            raise ValueError(
                f"expected tokenizer.symbols to be distinct and not empty, got {self.symbols}: "
                "remove the repeated or empty one"
            )
        smallest = SPECIAL_AND_BYTES + len(self.symbols)
        if self.vocab_size <= smallest:
            raise ValueError(
                f"expected vocab_size above {smallest} (4 special tokens, 256 bytes, "
                f"{len(self.symbols)} symbols), got {self.vocab_size}: raise tokenizer.vocab_size"
            )


def train(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    r"""Train a byte-pair encoding on `texts`; the result depends on texts and config alone.

    Returns a serialised SentencePiece model of exactly `config.vocab_size` pieces. Raises
    ValueError where the texts cannot fill such a vocabulary or have more characters than it.
    Sennrich et al. 2016 (BPE); Kudo and Richardson 2018 (SentencePiece).

    >>> config = TokenizerConfig(vocab_size=272, symbols=("\n",))
    >>> Tokenizer(train(["the cat sat on the mat", "the hat"], config)).vocab_size
    272
    """
    sentences = [text for text in texts if text]
    if not sentences:
        raise ValueError("expected text to train the tokenizer on, got none: check the data")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            user_defined_symbols=list(config.symbols),
            byte_fallback=True,
            character_coverage=0.9995,  # rarer characters are written as bytes
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 24,  # longer ones would be left out without a word
            num_threads=1,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), config)) from error
    return model.getvalue()


def _explain(message: str, config: TokenizerConfig) -> str:
    if most := re.search(r"value <= (\d+)", message):
        wanted, advice = f"at most {most[1]} (the texts hold no more pieces)", "lower"
    elif fewest := re.search(r"(\d+) vs (\d+)", message):
        wanted, advice = f"at least {fewest[2]} (the texts' characters and the bytes)", "raise"
    else:
        return f"expected texts that SentencePiece can train on, got {message!r}: check the data"
    return f"expected vocab_size {wanted}, got {config.vocab_size}: {advice} tokenizer.vocab_size"


def load(path: str | Path) -> bytes:
    """Read a SentencePiece model; ValueError where there is none or its special ids differ.

    >>> load("no/such.model")
    Traceback (most recent call last):
    ValueError: expected a SentencePiece model at no/such.model, got no file: set tokenizer.file
    """
    if not Path(path).is_file():
        raise ValueError(
            f"expected a SentencePiece model at {path}, got no file: set tokenizer.file"
        )
    model = Path(path).read_bytes()
    try:
        Tokenizer(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model


def build(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    r"""The model that `config` asks for: read from `config.file`, or else trained on `texts`.

    >>> config = TokenizerConfig(vocab_size=264, symbols=())
    >>> build(["abc abc"], config) == train(["abc abc"], config)
    True
    """
    return train(texts, config) if config.file is None else load(config.file)


class Tokenizer:
    r"""Text to token ids and back, from a serialised SentencePiece model.

    `encode` adds neither beginning nor end of sequence; `decode` skips padding, beginning and end.
    Markers such as "</s>" in a text are encoded as the characters that they are.

    >>> tokenizer = Tokenizer(train(["hello hello"], TokenizerConfig(vocab_size=266, symbols=())))
    >>> tokenizer.decode([BOS, *tokenizer.encode(" hello\n"), EOS, PAD])
    ' hello\n'
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model or b"none")
        except RuntimeError as error:
            raise ValueError(
                f"expected a SentencePiece model, got {len(model)} bytes of something else: "
                "give a .model file that SentencePiece wrote"
            ) from error
        pieces = self._pieces
        ids = (pieces.pad_id(), pieces.bos_id(), pieces.eos_id(), pieces.unk_id())
        if ids != (PAD, BOS, EOS, UNK):
            raise ValueError(
                f"expected ids (pad, bos, eos, unk) = {(PAD, BOS, EOS, UNK)}, got {ids}: train the "
                "model with --pad_id=0 --bos_id=1 --eos_id=2 --unk_id=3"
            )

    @property
    def vocab_size(self) -> int:
        """Number of pieces V; ids run from 0 to V − 1."""
        return self._pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without beginning or end of sequence."""
        return self._pieces.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids (any iterable of integers, an array too); special ones are silent."""
        return self._pieces.decode([int(i) for i in ids])
