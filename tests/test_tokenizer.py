"""The tokenizer writes any text and reads it back unchanged."""

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from infalign_jax.lm import tokenizer as tk

TEXTS = [
    "\n\nHuman: Name a bird that sings.\n\nAssistant: A robin sings, and a wren sings.",
    "\n\nHuman: Name a tree that bends.\n\nAssistant: A willow bends in the wind.",
] * 3
CONFIG = tk.TokenizerConfig(vocab_size=300)
MODEL = tk.train(TEXTS, CONFIG)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_decoding_undoes_encoding(text):
    tokenizer = tk.Tokenizer(MODEL)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(tk.UNK < i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize(
    "text", [" leading", "trailing ", "two  spaces", "\n\n", "a\tb\r\n", "é日😀"]
)
def test_white_space_and_rare_characters_survive(text):
    tokenizer = tk.Tokenizer(MODEL)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_skips_padding_beginning_and_end_and_takes_arrays():
    tokenizer = tk.Tokenizer(MODEL)
    ids = [tk.PAD, tk.PAD, tk.BOS, *tokenizer.encode("a wren"), tk.EOS, tk.PAD]
    assert tokenizer.decode(np.array(ids, np.int32)) == "a wren"


def test_markers_written_in_a_text_are_no_special_tokens():
    tokenizer = tk.Tokenizer(MODEL)
    ids = tokenizer.encode("<s>x</s><pad>")
    assert not {tk.PAD, tk.BOS, tk.EOS, tk.UNK} & set(ids)


def test_symbols_are_one_token_each_wherever_they_stand():
    turn = "\n\nHuman: sings\n\nAssistant:"
    with_symbols = tk.Tokenizer(MODEL).encode(turn)
    config = tk.TokenizerConfig(vocab_size=300, symbols=())
    without = tk.Tokenizer(tk.train(TEXTS, config)).encode(turn)
    assert with_symbols[0] == 4
    assert with_symbols[-1] == 5
    assert {4, 5}.isdisjoint(tk.Tokenizer(MODEL).encode(" sings"))
    assert without[0] != 4


def test_training_depends_on_texts_and_config_alone():
    assert tk.train(iter(TEXTS), CONFIG) == MODEL
    assert tk.train(reversed([*TEXTS, "wind"]), CONFIG) != MODEL


def test_the_vocabulary_has_the_size_asked_for_and_longer_pieces_shorten_text():
    small = tk.Tokenizer(tk.train(TEXTS, tk.TokenizerConfig(vocab_size=290)))
    large = tk.Tokenizer(tk.train(TEXTS, tk.TokenizerConfig(vocab_size=310)))
    assert (small.vocab_size, large.vocab_size) == (290, 310)
    assert len(large.encode(TEXTS[0])) < len(small.encode(TEXTS[0]))


def test_a_long_text_is_not_left_out_of_training():
    long = " ".join(["willow"] * 2000)
    model = tk.train(["z", long], tk.TokenizerConfig(vocab_size=273, symbols=()))
    assert len(tk.Tokenizer(model).encode(" willow")) == 1


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["hello world"] * 3, 2000, r"expected vocab_size at most \d+ .* got 2000: lower"),
        (["abcdefghij"], 264, r"expected vocab_size at least 27\d .* got 264: raise"),
        ([], 300, "expected text to train the tokenizer on, got none"),
        (["", ""], 300, "expected text to train the tokenizer on, got none"),
    ],
)
def test_texts_that_cannot_fill_the_vocabulary(texts, vocab_size, message):
    with pytest.raises(ValueError, match=message) as caught:
        tk.train(texts, tk.TokenizerConfig(vocab_size=vocab_size))
    assert "\n" not in str(caught.value)


def test_the_size_named_in_the_error_works():
    with pytest.raises(ValueError, match="at most") as caught:
        tk.train(TEXTS, tk.TokenizerConfig(vocab_size=5000))
    most = int(str(caught.value).split("at most ")[1].split()[0])
    model = tk.train(TEXTS, tk.TokenizerConfig(vocab_size=most))
    assert tk.Tokenizer(model).vocab_size == most


@pytest.mark.parametrize("symbols", [("a", "a"), ("",)])
def test_symbols_must_be_distinct_and_not_empty(symbols):
    with pytest.raises(ValueError, match=r"tokenizer\.symbols"):
        tk.TokenizerConfig(symbols=symbols)


def test_a_model_is_loaded_from_a_file_when_the_config_names_one(tmp_path):
    path = tmp_path / "birds.model"
    path.write_bytes(MODEL)
    assert tk.build([], tk.TokenizerConfig(file=str(path))) == MODEL
    assert tk.build(TEXTS, CONFIG) == MODEL


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_a_file_that_is_no_model_is_named(tmp_path, content):
    path = tmp_path / "x.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.model: expected a SentencePiece model"):
        tk.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"got no file: set tokenizer\.file"):
        tk.load(tmp_path / "none.model")


def test_a_model_with_other_special_ids_is_refused(tmp_path):
    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=35, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"expected ids \(pad, bos, eos, unk\)"):
        tk.load(f"{prefix}.model")
