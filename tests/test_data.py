"""Pairs become padded arrays by stated rules, and batches that can be resumed."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infalign_jax.data import Pair, encode, encode_prompts, minibatches
from infalign_jax.lm.tokenizer import BOS, EOS, PAD, Tokenizer, TokenizerConfig, train

TOKENIZER = Tokenizer(train(["a b c d"], TokenizerConfig(vocab_size=268, symbols=())))
ONE = TOKENIZER.encode("a")
assert len(ONE) == 1  # so that "aaa" below is three tokens


def test_prompts_end_at_the_right_and_responses_begin_at_the_left():
    rows, _ = encode([Pair("aa", "a", "aaa"), Pair("aaa", "aa", "a")], TOKENIZER, 5, 6)
    (a,) = ONE
    assert rows.prompts.tokens.tolist() == [[PAD, PAD, BOS, a, a], [PAD, BOS, a, a, a]]
    assert rows.responses.tokens.tolist() == [
        [[a, EOS, PAD, PAD, PAD, PAD], [a, a, a, EOS, PAD, PAD]],
        [[a, a, EOS, PAD, PAD, PAD], [a, EOS, PAD, PAD, PAD, PAD]],
    ]
    assert rows.prompts.mask.tolist() == (rows.prompts.tokens != PAD).tolist()
    assert rows.responses.mask.tolist() == (rows.responses.tokens != PAD).tolist()
    types = [x.dtype.name for x in (rows.prompts.tokens, rows.responses.mask, rows.prompts.index)]
    assert types == ["int32", "bool", "int32"]


def test_rows_of_one_prompt_share_its_number_and_prompts_alone_get_the_same():
    pairs = [Pair(p, "a", "aa") for p in ("aa", "aaaa", "a", "aa", " ", "aaa", "a")]
    rows, _ = encode(pairs, TOKENIZER, 4, 6)
    assert rows.prompts.index.tolist() == [0, 1, 0, 2, 1]
    prompts, counts = encode_prompts((pair.prompt for pair in pairs), TOKENIZER, 4)
    assert prompts.index.tolist() == [0, 1, 2]
    assert counts == {"prompts": 5, "empty_prompts": 1, "long_prompts": 1}
    np.testing.assert_array_equal(prompts.tokens[rows.prompts.index], rows.prompts.tokens)
    np.testing.assert_array_equal(prompts.mask[rows.prompts.index], rows.prompts.mask)


def test_a_row_dropped_for_its_response_does_not_renumber_the_prompts():
    pairs = [Pair("a", "aaaa", "a"), Pair("aa", "a", "aaaa"), Pair("aaa", "a", "aa")]
    rows, counts = encode(pairs, TOKENIZER, 4, 4, long_responses="drop")
    assert rows.prompts.index.tolist() == [2]
    assert (counts["long_response_rows"], counts["kept"]) == (2, 1)


def test_a_prompt_fits_with_its_beginning_and_a_response_with_its_end():
    fits = Pair("aaa", "aaa", "a")  # BOS and three tokens; three tokens and EOS
    rows, counts = encode([fits], TOKENIZER, 4, 4, "error", "error")
    assert rows.responses.tokens[0, 0, -1] == EOS
    assert counts["cut_responses"] == 0
    with pytest.raises(ValueError, match=r"prompts of at most 3 tokens, got one of 4: raise"):
        encode([fits], TOKENIZER, 3, 4, long_prompts="error")
    with pytest.raises(ValueError, match=r"responses of at most 3 tokens, got one of 4: raise"):
        encode([fits], TOKENIZER, 4, 3, long_responses="error")


def test_a_response_that_is_cut_has_no_end_and_is_counted():
    pairs = [Pair("a", "aaaa", "a"), Pair("a", "aaaa", "aaaaa")]
    rows, counts = encode(pairs, TOKENIZER, 2, 3)
    assert rows.responses.tokens[0, 0].tolist() == ONE * 3
    assert rows.responses.mask[0, 0].all()
    assert (counts["cut_responses"], counts["same_responses"]) == (3, 1)


@pytest.mark.parametrize("empty", [Pair(" \n", "a", "a"), Pair("a", "", "a"), Pair("a", "a", "\n")])
def test_rows_that_say_nothing_are_dropped_and_counted(empty):
    rows, counts = encode([empty, Pair("aa", "a", "aa")], TOKENIZER, 4, 4)
    assert len(rows.prompts.tokens) == len(rows.responses.tokens) == 1
    assert (counts["rows"], counts["empty_rows"], counts["kept"]) == (2, 1, 1)


words = st.integers(0, 6).map(lambda n: "a" * n)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.builds(Pair, words, words, words)), st.sampled_from(["cut", "drop"]))
def test_every_row_is_accounted_for(pairs, rule):
    pairs = [*pairs, Pair("a", "a", "aa")]
    rows, counts = encode(pairs, TOKENIZER, 4, 4, long_responses=rule)
    dropped = counts["empty_rows"] + counts["long_prompt_rows"] + counts["long_response_rows"]
    assert len(pairs) == counts["rows"] == counts["kept"] + dropped
    assert {len(leaf) for leaf in jax.tree.leaves(rows)} == {counts["kept"]}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "expected prompts of at most 4 tokens, got none among 0"),
        ([Pair("aaaa", "a", "a")], "expected prompts of at most 4 tokens, got none among 1"),
        ([Pair("a", "a", "")], "expected a row that can be kept"),
    ],
)
def test_no_row_left_is_an_error(pairs, message):
    with pytest.raises(ValueError, match=message):
        encode(pairs, TOKENIZER, 4, 4)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"expected long_prompts to be one of .* got 'cut'"):
        encode_prompts(["a"], TOKENIZER, 4, long_prompts="cut")
    with pytest.raises(ValueError, match=r"expected long_responses to be one of .* got 'trim'"):
        encode([Pair("a", "a", "a")], TOKENIZER, 4, 4, long_responses="trim")


ROWS = {"x": np.arange(20), "y": np.arange(40).reshape(20, 2)}


def deal(steps, **changed):
    batches = minibatches(ROWS, **({"batch_size": 8, "seed": 3} | changed))
    return [next(batches) for _ in range(steps)]


def test_every_pass_deals_each_row_once_in_a_new_order():
    dealt = np.concatenate([batch["x"] for batch in deal(5)])
    first, second = dealt[:20], dealt[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist() != list(range(20))


def test_rows_stay_together():
    for batch in deal(5):
        np.testing.assert_array_equal(batch["y"], np.stack([2 * batch["x"], 2 * batch["x"] + 1], 1))


def test_batches_hang_on_the_seed_alone():
    jax.tree.map(np.testing.assert_array_equal, deal(4), deal(4))
    assert deal(1)[0]["x"].tolist() != deal(1, seed=4)[0]["x"].tolist()


def test_a_stored_state_continues_after_the_last_batch():
    batches = minibatches(ROWS, 8, seed=3)
    for _ in range(4):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    resumed = minibatches(ROWS, 8, seed=3)
    resumed.set_state(state)
    for _ in range(3):
        np.testing.assert_array_equal(next(resumed)["x"], next(batches)["x"])


def test_hosts_read_their_own_rows_of_the_same_batches() -> None:
    whole, first, second = (
        minibatches(ROWS, 8, seed=3, own=own) for own in (None, np.arange(3), np.arange(3, 8))
    )
    for _ in range(4):
        parts = [next(first), next(second)]
        jax.tree.map(
            lambda x, *own: np.testing.assert_array_equal(np.concatenate(own), x),
            next(whole),
            *parts,
        )
        assert len(jax.tree.leaves(parts[0])[0]) == 3


def test_batches_of_preferences_keep_their_shapes():
    rows, _ = encode([Pair("a" * n, "a", "aa") for n in range(1, 6)], TOKENIZER, 8, 4)
    batch = next(minibatches(rows, 2, seed=0))
    assert batch.prompts.tokens.shape == (2, 8)
    assert batch.responses.mask.shape == (2, 2, 4)
    lengths = batch.prompts.mask.sum(axis=1) - 2  # BOS, and counting from 0
    assert lengths.tolist() == batch.prompts.index.tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 21}, r"expected 1 ≤ batch_size ≤ 20 .* got 21"),
        ({"batch_size": 0}, r"expected 1 ≤ batch_size ≤ 20 .* got 0"),
        ({"seed": -1}, r"[Ss]eed must be .* \(got seed=-1\)"),
    ],
)
def test_batches_that_cannot_be_dealt(changed, message):
    with pytest.raises(ValueError, match=message):
        deal(1, **changed)


def test_arrays_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"expected arrays of one length, got \[2, 3\]"):
        minibatches({"x": np.zeros(2), "y": np.zeros(3)}, 1, seed=0)


def test_importing_waits_for_neither_tfds_nor_grain():
    code = "import sys, infalign_jax.hh, infalign_jax.store; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "infalign_jax.data" in done.stdout.split()
    assert {"grain", "tensorflow_datasets", "tensorflow"}.isdisjoint(done.stdout.split())
