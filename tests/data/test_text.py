"""Tokens and targets of a record, compared with a second derivation of the reference's mask."""

import logging
from importlib import resources

import numpy as np
import pytest
from tokenizers import Tokenizer

from lora_jax.data import batches, text
from lora_jax.data.sets import e2e
from lora_jax.slots import FIRST_SLOT, Slots

EOS = 0


@pytest.fixture(scope="module")
def tokenizer():
  folder = resources.files("lora_jax") / "assets" / "gpt2"
  return Tokenizer.from_str((folder / "tokenizer.json").read_text("utf-8"))


def reference_arrays(tokenizer, record, length=512):
  """Input, target and mask of Hu et al.'s padded rows, derived only from their description."""
  context = tokenizer.encode(record.context).ids
  completion = tokenizer.encode(" " + record.completion).ids
  whole = [*context, EOS, *completion, EOS][:length]
  mask = [0] * len(context) + [1] * (len(whole) - len(context) - 1)
  return [np.array(row + [0] * (length - len(row)), np.int32) for row in (whole, whole[1:], mask)]


def test_loss_positions_are_those_of_the_reference(tokenizer):
  records = e2e.read("test")[::50]
  examples = text.encode(tokenizer, records, EOS, 512)
  padded = batches.padded_batches(
    examples, batch_size=1, row_lengths=[512], loss_length=128, seed=None
  )
  for i, (record, example) in enumerate(zip(records, examples, strict=True)):
    tokens, targets, mask = reference_arrays(tokenizer, record)
    (where,) = np.nonzero(mask)
    np.testing.assert_array_equal(example.target_index, where)
    np.testing.assert_array_equal(example.targets, targets[where])
    assert (example.targets[-1], tokens[len(example.tokens)]) == (EOS, EOS)
    batch = padded[i]
    np.testing.assert_array_equal(batch["tokens"][0], tokens)  # padding is 0, as EOS is here
    real = batch["target_weights"][0] == 1
    assert real.sum() == mask.sum()
    np.testing.assert_array_equal(batch["target_index"][0][real], where)
    np.testing.assert_array_equal(batch["targets"][0][real], targets[where])


def test_a_record_by_hand(tokenizer):
  example = text.encode(tokenizer, [e2e.Record("name : A", "It is A .")], EOS, 512)[0]
  context = tokenizer.encode("name : A").ids
  completion = tokenizer.encode(" It is A .").ids
  assert example.tokens.tolist() == [*context, EOS, *completion]
  assert example.targets.tolist() == [*completion, EOS]
  n = len(context)
  assert example.target_index.tolist() == list(range(n, n + len(completion) + 1))
  assert text.encode_context(tokenizer, ["name : A"], EOS) == [[*context, EOS]]
  assert {array.dtype for array in example} == {np.dtype(np.int32)}


def test_long_records_are_refused_or_cut_as_the_reference_does(tokenizer, caplog):
  records = e2e.read("test")[:20]
  lengths = [len(e.tokens) + 1 for e in text.encode(tokenizer, records, EOS, 512)]
  limit = sorted(set(lengths))[-3]
  longer = [i for i, length in enumerate(lengths) if length > limit]
  with pytest.raises(
    ValueError, match=rf"{len(longer)} of 20 records .* first is record {longer[0]}"
  ):
    text.encode(tokenizer, records, EOS, limit)
  with caplog.at_level(logging.WARNING):
    examples = text.encode(tokenizer, records, EOS, limit, truncate=True)
  assert caplog.messages == [f"{len(longer)} of 20 records truncated to {limit} tokens"]
  for record, example in zip(records, examples, strict=True):
    tokens, targets, mask = reference_arrays(tokenizer, record, limit)
    (where,) = np.nonzero(mask)
    np.testing.assert_array_equal(example.target_index, where)
    np.testing.assert_array_equal(example.targets, targets[where])
    np.testing.assert_array_equal(example.tokens, tokens[: len(example.tokens)])


def test_a_context_that_leaves_no_room_is_refused(tokenizer):
  with pytest.raises(ValueError, match=r"record 0: the context has .* expected room"):
    text.encode(tokenizer, [e2e.Record("name : A", "It is A .")], EOS, 3, truncate=True)


def test_tokenizers_that_change_lengths_and_unknown_ends_are_refused(tokenizer):
  padding = Tokenizer.from_str(tokenizer.to_str())
  padding.enable_padding()
  with pytest.raises(ValueError, match="without padding and truncation"):
    text.encode(padding, e2e.read("test")[:2], EOS, 512)
  with pytest.raises(ValueError, match="eos_id below the tokenizer's 8192 tokens, got 50256"):
    text.encode(tokenizer, e2e.read("test")[:2], 50256, 512)


def test_slots_are_around_the_prompt():
  words = text.Example(*(np.array(x, np.int32) for x in ([5, 6, 7, 8], [7, 8, 9], [1, 2, 3])))
  (example,) = text.with_slots([words], Slots(2, 1))
  first = FIRST_SLOT
  assert example.tokens.tolist() == [first, first + 1, 5, 6, first + 2, 7, 8]
  assert example.target_index.tolist() == [4, 5, 6]  # the infix predicts the first target
  assert example.targets is words.targets
  assert {array.dtype for array in example} == {np.dtype(np.int32)}
  (same,) = text.with_slots([words], Slots())
  assert same is words  # large data sets without slots are not copied


def test_infix_slots_need_one_answer():
  answers = text.Example(*(np.array(x, np.int32) for x in ([5, 6, 7, 8], [6, 9], [0, 3])))
  (example,) = text.with_slots([answers], Slots(2))
  assert example.tokens.tolist() == [FIRST_SLOT, FIRST_SLOT + 1, 5, 6, 7, 8]
  with pytest.raises(ValueError, match="example 0 has several answers, and 1 infix slots"):
    text.with_slots([answers], Slots(2, 1))
