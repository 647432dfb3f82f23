"""Users' own examples are read strictly, and supervised where they say."""

import json

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers

from lora_jax.data.jsonl import (
  Completion,
  Conversation,
  Rendered,
  encode_completions,
  encode_prompts,
  encode_rendered,
  read_jsonl,
)
from lora_jax.models.text.tokenizer import load_tokenizer

from tests.paths import GOLDEN
from tests.tiny_e2e import EMBEDDED

SENTENCEPIECE = GOLDEN / "tokenizers"
TOKENIZER = load_tokenizer(EMBEDDED)
PROMPT = {"prompt": "Say: ", "completion": "hello there"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}


def write(path, *lines):
  text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
  path.write_text("\n".join(text), "utf-8")
  return path


def learned(example):
  """Returns the text before an example's supervised tokens, and their text."""
  first = int(example.target_index[0])
  return TOKENIZER.decode(example.tokens[: first + 1].tolist()), TOKENIZER.decode(
    example.targets.tolist(), skip_special_tokens=False
  )


def test_both_formats(tmp_path):
  path = write(tmp_path / "a.jsonl", PROMPT, "", {**PROMPT, "id": 3})
  assert read_jsonl(path, ["id"]) == [
    Completion(f"{path}:1", "Say: ", "hello there"),
    Completion(f"{path}:3", "Say: ", "hello there"),
  ]
  path = write(tmp_path / "b.jsonl", CHAT)
  assert read_jsonl(path) == [Conversation(f"{path}:1", CHAT["messages"])]
  line = '{"prompt": "a", "completion": "one\u2028line \u0085 é"}'  # ends for str.splitlines alone
  assert read_jsonl(write(tmp_path / "c.jsonl", line))[0].completion == "one\u2028line \u0085 é"


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{'prompt': 1}", "is not JSON"),
    ('{"prompt": "a", "compl', "is not JSON"),
    ([1], "expected an object, got list"),
    ({"prompt": "a"}, "expected the fields prompt and completion, or messages; got prompt"),
    ({**PROMPT, "id": 3}, "got completion, id, prompt. Further fields are named in"),
    ({**PROMPT, **CHAT}, "got completion, messages, prompt"),
    ({"prompt": "a", "completion": 3}, "completion: expected a text that is not empty, got 3"),
    ({"prompt": "", "completion": "b"}, "prompt: expected a text that is not empty, got ''"),
    ('{"prompt": "a", "completion": "\\ud83d"}', "half of a surrogate pair"),
    ({"messages": []}, "a list of one or more"),
    ({"messages": ["Hi"]}, "message 1: expected an object with role and content, got str"),
    ({"messages": [{"content": "Hi"}]}, "message 1: expected an object with .*, got content"),
    ({"messages": [{"role": "bot", "content": "Hi"}]}, "role must be system, user, .* 'bot'"),
    ({"messages": [{"role": "user", "content": None}]}, "content: expected a text"),
    ({"messages": CHAT["messages"][:1]}, "no message is the assistant's"),
    (CHAT, "is a conversation and .*:1 a completion; expected one format"),
  ],
)
def test_a_malformed_line_is_named(line, message, tmp_path):
  path = write(tmp_path / "mine.jsonl", PROMPT, line)
  with pytest.raises(ValueError, match=f"mine.jsonl:2.*{message}"):
    read_jsonl(path)


def test_files_without_lines(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none.jsonl does not exist"):
    read_jsonl(tmp_path / "none.jsonl")
  with pytest.raises(ValueError, match="has no lines"):
    read_jsonl(write(tmp_path / "empty.jsonl", "", " "))
  (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff", "completion": "a"}')
  with pytest.raises(ValueError, match=r"bytes.jsonl:1: expected UTF-8, got byte 0xff"):
    read_jsonl(tmp_path / "bytes.jsonl")


@pytest.mark.parametrize(
  ("prompt", "completion"),
  [("Say: ", "yes"), ("Say:", " yes"), ("cat", "chat"), ("a\n", "\n é 🎉\n")],
)
def test_a_prompt_has_the_tokens_that_it_is_asked_with(prompt, completion):
  (example,) = encode_completions(TOKENIZER, [Completion("", prompt, completion)], 0, 64)
  (alone,) = encode_prompts(TOKENIZER, [prompt], 0)
  assert example.tokens[: len(alone)].tolist() == alone
  assert learned(example) == (prompt, completion + "<|endoftext|>")
  np.testing.assert_array_equal(
    example.target_index, len(alone) - 1 + np.arange(len(example.targets))
  )


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_completions_by_sentencepiece_have_no_space_put_before_them(name):
  tokenizer = load_tokenizer(SENTENCEPIECE / name)
  (end_id,) = tokenizer.encode("</s>", add_special_tokens=False).ids[-1:]
  for prompt, completion in (("Say: ", "yes"), ("Say:", " yes"), ("cat", "chat"), ("a\n", "\n é")):
    (example,) = encode_completions(tokenizer, [Completion("", prompt, completion)], end_id, 64)
    count = int(example.target_index[0]) + 1
    assert example.tokens[:count].tolist() == encode_prompts(tokenizer, [prompt], end_id)[0]
    whole = [*example.tokens.tolist(), int(example.targets[-1])]
    assert tokenizer.decode(whole[:-1]) == prompt + completion


LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
  r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
  ("completion", "first"),
  [
    ("<div>hello", "<div"),
    ("\\frac{1}", "\\frac"),
    ('"Hello" she', '"Hello'),
    ("\n\n(yes)", "ĊĊ"),
    (" (yes)", "Ġ("),
    ("'s", "'s"),
  ],
)
def test_completions_by_llama_3s_words_start_as_within_a_text(completion, first):
  """Its words may start with a sign, with which a sign before them would merge."""
  tokenizer = Tokenizer(models.BPE())
  split = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
  bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  texts = ['<div>hello\n\\frac{1}\n"Hello" she is (yes)\nit\'s\n\n(no)\n'] * 9
  trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator([*texts, " (yes) (no) yes"], trainer)
  (example,) = encode_completions(tokenizer, [Completion("", "a", completion)], 0, 64)
  assert tokenizer.id_to_token(int(example.targets[0])) == first


def test_white_space_is_supervised_where_the_tokenizer_trims_offsets():
  tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
  segments = [("def f():", False), ("\n        return  1 \U0001f389", True)]
  (expected,) = encode_rendered(tokenizer, [Rendered("", [segments])], 64)
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
  assert any(start == end for start, end in tokenizer.encode(segments[1][0]).offsets)
  (example,) = encode_rendered(tokenizer, [Rendered("", [segments])], 64)
  np.testing.assert_array_equal(example.targets, expected.targets)
  assert tokenizer.decode(example.targets.tolist()) == segments[1][0]


def test_segments_of_a_conversation():
  segments = [("User: Hi\nBot:", False), (" Hello!\n", True), ("User: Bye\nBot:", False)]
  segments += [(" See you.", True), ("\n", False)]
  (example,) = encode_rendered(TOKENIZER, [Rendered("", [segments])], 64)
  whole = TOKENIZER.encode("".join(text for text, _ in segments), add_special_tokens=False).ids
  assert example.tokens.tolist() == whole[: len(example.tokens)]
  assert TOKENIZER.decode(example.targets.tolist()) == " Hello!\n See you."
  following = [whole[i + 1] for i in example.target_index]
  assert following == example.targets.tolist()


def test_a_token_of_two_segments_is_supervised():
  segments = [("a", False), (" tw", False), ("o", True)]
  (example,) = encode_rendered(TOKENIZER, [Rendered("", [segments])], 64)
  assert TOKENIZER.decode(example.targets.tolist()) == " two"


def test_examples_that_are_too_long(caplog):
  records = [Completion("f:1", "a", "b"), Completion("f:2", "a", "word " * 40)]
  with pytest.raises(
    ValueError, match=r"1 of 2 examples have more than 20 tokens, the first f:2 \(\d+\)"
  ):
    encode_completions(TOKENIZER, records, 0, 20)
  examples = encode_completions(TOKENIZER, records, 0, 20, truncate=True)
  assert len(examples[1].tokens) == 19
  assert "1 of 2 examples truncated to 20 tokens" in caplog.text
  records = [Completion("f:1", "word " * 40, "b")]
  with pytest.raises(ValueError, match="f:1: none of the first 20 tokens is supervised"):
    encode_completions(TOKENIZER, records, 0, 20, truncate=True)


def test_a_completion_that_is_cut_before_it_is_encoded_has_no_end():
  """It has few tokens for its characters, as white space does."""
  record = Completion("f:1", "a", "b" + " " * 5000)
  tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "\n": 2}, unk_token="a"))
  tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n"), "isolated")
  tokenizer.add_tokens(["b"])
  (example,) = encode_completions(tokenizer, [record], 9, 20, truncate=True)
  assert 9 not in example.targets
  (example,) = encode_completions(tokenizer, [record], 9, 50, truncate=True)
  assert example.targets[-1] == 9


def test_a_tokenizer_that_truncates():
  tokenizer = load_tokenizer(EMBEDDED)
  tokenizer.enable_truncation(4)
  with pytest.raises(ValueError, match="neither pads nor truncates"):
    encode_prompts(tokenizer, ["a"], 0)
