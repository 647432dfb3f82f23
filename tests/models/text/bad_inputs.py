"""Tokenizers and chat templates that are refused."""

import json
import os
import shutil
from functools import partial

import tokenizers

from lora_jax.data.jsonl import encode_prompts
from lora_jax.models.text import rendering
from lora_jax.models.text.chat import (
  ChatTemplate,
  chat_parts,
  load_chat_template,
  prompt_parts,
  render_chat,
  text_after_answers,
)
from lora_jax.models.text.tokenizer import load_tokenizer, read_special_tokens

from tests.bad_inputs import BadInput
from tests.gguf_vocabularies import write_tiny
from tests.paths import GOLDEN
from tests.tiny_e2e import EMBEDDED

BERT, LLAMA, ROBERTA = (GOLDEN / "tokenizers" / name for name in ("bert", "llama", "roberta"))
USER = {"role": "user", "content": "Hi"}
TURNS = [USER, {"role": "assistant", "content": "Yes"}]
QUESTION_END = "{% if add_generation_prompt %}A:{% endif %}"


def written(folder, **files):
  """Writes files, `vocab_txt` for vocab.txt: bytes, text or a value of JSON."""
  for name, content in files.items():
    if not isinstance(content, bytes):
      content = (content if isinstance(content, str) else json.dumps(content)).encode()
    stem, _, suffix = name.rpartition("_")
    (folder / f"{stem}.{suffix}").write_bytes(content)
  return folder


def tokenizer(source=None, call=load_tokenizer, **files):
  """Returns the call for a folder with a tokenizer's files and some that are changed."""

  def load(folder):
    if source is not None:
      shutil.copytree(source, folder, dirs_exist_ok=True)
    return call(written(folder, **files))

  return load


def config(source=BERT, **values):
  return tokenizer(source, tokenizer_config_json=values)


def vocabulary(vocab, merges: str | bytes = "#version: 0.2\n"):
  return tokenizer(vocab_json=vocab, merges_txt=merges)


def path_that_is(kind, name, call):
  """Returns the call for a folder in which a file is of another kind."""

  def load(folder):
    make = {"folder": os.mkdir, "fifo": os.mkfifo, "device": partial(os.symlink, "/dev/zero")}
    make[kind](folder / name)
    return call(folder)

  return load


def template(source, messages=TURNS, call=render_chat, **names):
  return lambda _: call(ChatTemplate(source), messages, **names)


def within_a_second(call):
  def limited(folder):
    seconds, rendering.SECONDS = rendering.SECONDS, 0.1
    try:
      return call(folder)
    finally:
      rendering.SECONDS = seconds

  return limited


def pathological():
  """Returns a tokenizer with a pattern that backtracks without end."""
  model = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
  built = tokenizers.Tokenizer(model)
  pattern = tokenizers.Regex("(a+)+c")
  built.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
  return built


def gguf(model="gpt2", call=load_tokenizer, **values):
  """Returns the call for a GGUF file with keys that are changed, or left out by None."""
  return lambda folder: call(write_tiny(folder, model, **values))


def truncated_gguf(folder):
  path = write_tiny(folder, "gpt2")
  path.write_bytes(path.read_bytes()[:-40])
  return load_tokenizer(path)


def nested(levels):
  return "[" * levels


ROWS = [
  # ---- tokenizers
  BadInput(
    "no tokenizer", tokenizer(), ("holds no tokenizer", "tokenizer.json"), FileNotFoundError
  ),
  BadInput(
    "no folder",
    lambda folder: load_tokenizer(folder / "none"),
    ("none", "holds no tokenizer"),
    FileNotFoundError,
  ),
  BadInput("a bucket", lambda _: load_tokenizer("gs://models/llama"), ("gs://", "local path")),
  BadInput(
    "special tokens of a bucket", lambda _: read_special_tokens("s3://m"), ("s3://", "local path")
  ),
  BadInput(
    "a template of a bucket", lambda _: load_chat_template("hf://m/x"), ("hf://", "local path")
  ),
  BadInput("an empty tokenizer.json", tokenizer(tokenizer_json=b""), ("tokenizer.json",)),
  BadInput("an object without fields", tokenizer(tokenizer_json={}), ("tokenizer.json", "broken")),
  BadInput("a list", tokenizer(tokenizer_json=[1]), ("tokenizer.json",)),
  BadInput("binary", tokenizer(tokenizer_json=bytes(range(256))), ("tokenizer.json",)),
  BadInput("nested deeply", tokenizer(tokenizer_json=nested(10**5)), ("tokenizer.json", "nested")),
  BadInput(
    "a key twice", tokenizer(tokenizer_json='{"model": 1, "model": 2}'), ("tokenizer.json", "twice")
  ),
  BadInput(
    "tokenizer.json is a folder",
    path_that_is("folder", "tokenizer.json", load_tokenizer),
    ("tokenizer.json is a folder", "expected a file"),
  ),
  BadInput(
    "tokenizer.json is a fifo",
    path_that_is("fifo", "tokenizer.json", load_tokenizer),
    ("tokenizer.json is a fifo",),
  ),
  BadInput(
    "tokenizer.model is a folder",
    path_that_is("folder", "tokenizer.model", load_tokenizer),
    ("tokenizer.model is a folder",),
  ),
  BadInput(
    "vocab.txt is a device",
    path_that_is("device", "vocab.txt", load_tokenizer),
    ("vocab.txt is a fifo, a socket or a device",),
  ),
  BadInput(
    "a tokenizer_config.json that is a fifo",
    lambda folder: (os.mkfifo(folder / "tokenizer_config.json"), read_special_tokens(folder)),
    ("tokenizer_config.json is a fifo",),
  ),
  BadInput("no merges", tokenizer(vocab_json={"a": 0}), ("merges.txt",), FileNotFoundError),
  BadInput("no vocabulary", tokenizer(merges_txt="a b"), ("vocab.json",), FileNotFoundError),
  BadInput("a vocabulary that is a list", vocabulary(["a"]), ("vocab.json", "JSON object")),
  BadInput("ids that are texts", vocabulary({"a": "0"}), ("vocab.json", "'a'", "'0'")),
  BadInput("ids that are truth values", vocabulary({"a": True}), ("vocab.json", "True")),
  BadInput("negative ids", vocabulary({"a": -1}), ("vocab.json", "-1")),
  BadInput("large ids", vocabulary({"a": 2**40}), ("vocab.json", str(2**40))),
  BadInput("one id for two tokens", vocabulary({"a": 0, "b": 0}), ("vocab.json", "0", "'b'")),
  BadInput("no tokens", vocabulary({}), ("vocab.json",)),
  BadInput("a token twice", vocabulary('{"a": 0, "a": 1}'), ("vocab.json", "'a'", "twice")),
  BadInput("merges of no token", vocabulary({"a": 0}, "#version\nx y\n"), ("broken", "merges")),
  BadInput("a merge of one", vocabulary({"a": 0}, "#version\na\n"), ("broken",)),
  BadInput("merges that are binary", vocabulary({"a": 0}, b"\xff\xfe"), ("merges.txt", "UTF-8")),
  BadInput("an empty vocab.txt", tokenizer(vocab_txt=""), ("vocab.txt",)),
  BadInput(
    "a word twice",
    tokenizer(vocab_txt="[UNK]\na\na\n"),
    ("vocab.txt", "1 tokens occur twice", "'a'"),
  ),
  BadInput("words without the unknown", tokenizer(vocab_txt="a\nb\n"), ("[UNK]", "vocabulary")),
  BadInput(
    "a pathological pattern",
    lambda _: encode_prompts(pathological(), ["a" * 64], 0),
    ("the tokenizer fails", "64 characters", "retry-limit"),
  ),
  BadInput("a foreign tokenizer.model", tokenizer(tokenizer_model=b"{}"), ("tokenizer.model",)),
  BadInput("an empty tokenizer.model", tokenizer(tokenizer_model=b""), ("tokenizer.model",)),
  # ---- tokenizer_config.json and its like
  BadInput("a config that is a list", tokenizer(BERT, tokenizer_config_json=[]), ("JSON object",)),
  BadInput(
    "a config with a key twice",
    tokenizer(BERT, tokenizer_config_json='{"do_lower_case": true, "do_lower_case": false}'),
    ("tokenizer_config.json", "do_lower_case", "twice"),
  ),
  BadInput("a number for a token", config(unk_token=3), ("unk_token", "text", "3")),
  BadInput("a list for a token", config(unk_token=["a"]), ("unk_token", "['a']")),
  BadInput("a token without content", config(unk_token={"lstrip": True}), ("unk_token",)),
  BadInput("a token of no text", config(unk_token={"content": ""}), ("unk_token", "''")),
  BadInput("a missing token", config(unk_token="<none>"), ("unk_token '<none>'", "not in the voc")),
  BadInput(
    "an option of another type",
    config(unk_token={"content": "[UNK]", "lstrip": "no"}),
    ("unk_token", "lstrip", "true or false", "'no'"),
  ),
  BadInput("a text for lower case", config(do_lower_case="no"), ("do_lower_case", "'no'")),
  BadInput("a number for accents", config(strip_accents=2), ("strip_accents", "2")),
  BadInput("a number for a class", config(ROBERTA, tokenizer_class=5), ("tokenizer_class", "5")),
  BadInput(
    "a text for the prefix",
    config(LLAMA, add_prefix_space="false"),
    ("add_prefix_space", "'false'"),
  ),
  BadInput("a number for legacy", config(LLAMA, legacy=1), ("legacy", "1")),
  BadInput("a text for bos", config(LLAMA, add_bos_token="yes"), ("add_bos_token", "'yes'")),
  BadInput("a list for eos", config(LLAMA, add_eos_token=[]), ("add_eos_token", "[]")),
  BadInput("splitting by punctuation", config(LLAMA, split_by_punct=True), ("split_by_punct",)),
  BadInput(
    "an end without its token",
    tokenizer(
      vocab_json={"a": 0},
      merges_txt="#version\n",
      tokenizer_config_json={"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"},
    ),
    ("expected a bos_token", "add_bos_token is true"),
  ),
  BadInput(
    "added tokens in a list",
    config(added_tokens_decoder=["a"]),
    ("added_tokens_decoder", "type dict", "['a']"),
  ),
  BadInput(
    "an id that is a word",
    config(added_tokens_decoder={"x": {"content": "a"}}),
    ("added_tokens_decoder", "'x'"),
  ),
  BadInput(
    "an added number", config(added_tokens_decoder={"5": 3}), ("added token 5", "text", "3")
  ),
  BadInput(
    "an added token of another id",
    config(added_tokens_decoder={"7": {"content": "<b>"}}),
    ("'<b>'", "not 7"),
  ),
  BadInput(
    "an id of text", tokenizer(BERT, added_tokens_json={"<b>": "1"}), ("added_tokens.json", "'1'")
  ),
  BadInput(
    "an id that is null", tokenizer(BERT, added_tokens_json={"<b>": None}), ("added_tokens.json",)
  ),
  BadInput(
    "a special map that is text",
    tokenizer(BERT, special_tokens_map_json='"a"'),
    ("special_tokens_map.json", "JSON object"),
  ),
  BadInput(
    "half of a surrogate pair",
    tokenizer(call=read_special_tokens, tokenizer_config_json='{"eos_token": "\\ud83d"}'),
    ("tokenizer_config.json", "surrogate"),
  ),
  BadInput(
    "another model's",
    lambda _: load_tokenizer(EMBEDDED, 50257),
    ("8,192 tokens", "50,257", "belong together"),
  ),
  # ---- GGUF files
  BadInput(
    "a GGUF file that is missing",
    lambda folder: load_tokenizer(folder / "model.gguf"),
    ("model.gguf does not exist",),
    FileNotFoundError,
  ),
  BadInput("a truncated GGUF file", truncated_gguf, ("tiny.gguf", "truncated")),
  BadInput(
    "a GGUF file without a tokenizer",
    gguf(model=None),
    ("tiny.gguf holds no tokenizer", "no tokenizer.ggml.model"),
    FileNotFoundError,
  ),
  BadInput(
    "a GGUF file without tokens",
    gguf(tokens=None),
    ("holds no tokenizer", "no tokenizer.ggml.tokens"),
    FileNotFoundError,
  ),
  BadInput(
    "another model of tokenizers", gguf("bert"), ("'bert'", "gpt2, llama", "tokenizer.json")
  ),
  BadInput("a model that is a number", gguf(7), ("tokenizer.ggml.model must be a string", "7")),
  BadInput(
    "an unknown pre-tokenizer",
    gguf(pre="tekken"),
    ("tokenizer.ggml.pre 'tekken'", "gpt-2, smollm, llama-bpe, qwen2"),
  ),
  BadInput(
    "the default pre-tokenizer",
    gguf(pre="default"),
    ("does not say how text is split", "gpt-2, smollm, llama-bpe, qwen2", "--pre-tokenizer"),
  ),
  BadInput(
    "no pre-tokenizer", gguf(pre=None), ("does not say how text is split", "tokenizer.ggml")
  ),
  BadInput(
    "SentencePiece with a pre-tokenizer",
    gguf("llama", pre="qwen2"),
    ("tokenizer.ggml.pre 'qwen2'", "SentencePiece"),
  ),
  BadInput("no list of merges", gguf(merges=None), ("has no tokenizer.ggml.merges", "Convert")),
  BadInput("merges that are numbers", gguf(merges=[1]), ("merges must be a list of str", "[1]")),
  BadInput("merges that are text", gguf(merges="a b"), ("merges must be a list of str", "'a b'")),
  BadInput("a merge of one token", gguf(merges=["ab"]), ("merges[0]", "two tokens", "'ab'")),
  BadInput("a merge of three", gguf(merges=["a b", "a b a"]), ("merges[1]", "'a b a'")),
  BadInput(
    "a merge of an unknown token", gguf(merges=["a c"]), ("merges", "'a' with 'c'", "no 'c'")
  ),
  BadInput("a merge to an unknown token", gguf(merges=["b a"]), ("'b' with 'a'", "no 'ba'")),
  BadInput(
    "tokens that are numbers", gguf(tokens=[1, 2]), ("tokens must be a list of str", "[1, 2]")
  ),
  BadInput(
    "a token twice in a GGUF file",
    gguf(tokens=["<unk>", "<s>", "</s>", "a", "b", "a"]),
    ("tokens 3 and 5 are both 'a'",),
  ),
  BadInput(
    "an empty token in a GGUF file",
    gguf(tokens=["<unk>", "<s>", "</s>", "a", "b", ""]),
    ("token 5 has 0 characters",),
  ),
  BadInput("no token types", gguf(token_type=None), ("has no tokenizer.ggml.token_type",)),
  BadInput(
    "too few token types", gguf(token_type=[1] * 5), ("token_type has 5 entries", "6 tokens")
  ),
  BadInput(
    "an unknown token type", gguf(token_type=[3] * 5 + [9]), ("token 5, 'ab'", "9", "1 to 6")
  ),
  BadInput("a byte among merges", gguf(token_type=[3] * 5 + [6]), ("token 5, 'ab'", "byte")),
  BadInput("an end out of range", gguf(eos_token_id=6), ("eos_token_id", "[0, 5]", "6")),
  BadInput(
    "padding out of range", gguf(padding_token_id=2**32 - 1), ("padding_token_id", "[0, 5]")
  ),
  BadInput("a turn's end that is text", gguf(eot_token_id="</s>"), ("eot_token_id", "'</s>'")),
  BadInput(
    "a start without its id", gguf(add_bos_token=True, bos_token_id=None), ("bos_token_id",)
  ),
  BadInput(
    "a flag that is a number", gguf(add_eos_token=1), ("add_eos_token", "true or false", "1")
  ),
  BadInput("no scores", gguf("llama", scores=None), ("has no tokenizer.ggml.scores",)),
  BadInput("too few scores", gguf("llama", scores=[0.0]), ("scores has 1 entries", "264 tokens")),
  BadInput(
    "a score that is not finite",
    gguf("llama", scores=[float("nan")] * 264),
    ("scores has a score that is not finite",),
  ),
  BadInput(
    "too few bytes",
    gguf("llama", token_type=[2, 3, 3, 1, 1, 1, 1, 1, *[6] * 255, 1]),
    ("255 of the 256 byte tokens", "<0xFF> is missing"),
  ),
  BadInput(
    "a GGUF file of another model",
    lambda folder: load_tokenizer(write_tiny(folder, "gpt2"), 64),
    ("6 tokens", "model 64", "each row of the embedding"),
  ),
  BadInput(
    "a template that is not a string in a GGUF file",
    gguf(call=load_chat_template, **{"tokenizer.chat_template": 3}),
    ("tokenizer.chat_template must be a string", "3"),
  ),
  BadInput(
    "a named template that is not a string",
    gguf(call=load_chat_template, **{"tokenizer.chat_template.rag": ["a"]}),
    ("tokenizer.chat_template.rag must be a string",),
  ),
  BadInput(
    "a GGUF file without a template",
    gguf(call=load_chat_template),
    ("no chat template", "tokenizer.chat_template"),
    FileNotFoundError,
  ),
  BadInput(
    "a GGUF file without a default template",
    gguf(call=load_chat_template, **{"tokenizer.chat_template.rag": "a"}),
    ("named 'default'", "'rag'"),
  ),
  BadInput(
    "a temperature that is text", gguf(**{"general.sampling.temp": "hot"}), ("temp", "'hot'")
  ),
  # ---- chat templates
  BadInput(
    "no template", lambda f: load_chat_template(f), ("no chat template",), FileNotFoundError
  ),
  BadInput(
    "a template that is a number",
    tokenizer(call=load_chat_template, tokenizer_config_json={"chat_template": 3}),
    ("chat template as text", "int"),
  ),
  BadInput(
    "several templates, no default",
    tokenizer(
      call=load_chat_template,
      tokenizer_config_json={"chat_template": [{"name": "rag", "template": "a"}]},
    ),
    ("named 'default'", "'rag'"),
  ),
  BadInput(
    "a template that is a folder",
    path_that_is("folder", "chat_template.jinja", load_chat_template),
    ("chat_template.jinja is a folder",),
  ),
  BadInput(
    "a template that is binary",
    tokenizer(call=load_chat_template, chat_template_jinja=b"\xff\x00"),
    ("chat_template.jinja", "UTF-8"),
  ),
  BadInput("a syntax error", template("{{ a\n{% for %}"), ("line 2 of the chat template",)),
  BadInput("an unknown tag", template("{% nonsense %}"), ("line 1", "nonsense")),
  BadInput("an unknown filter", template("{{ 1 | nonsense }}"), ("line 1", "nonsense")),
  BadInput("an unclosed block", template("{% generation %}"), ("line 1", "endgeneration")),
  BadInput(
    "blocks within another",
    template(
      "{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}", call=chat_parts
    ),
    ("{% generation %} block within another",),
  ),
  BadInput("an attribute of an undefined name", template("{{ a.b }}"), ("'a' is undefined",)),
  BadInput("a call of an undefined name", template("{{ a() }}"), ("'a' is undefined",)),
  BadInput("a template that raises", template("{{ raise_exception('No!') }}"), ("user", "No!")),
  BadInput("an include", template("{% include 'a' %}"), ("refuses", "loader")),
  BadInput("an import", template("{% import 'a' as a %}"), ("refuses", "loader")),
  BadInput("an ancestor", template("{% extends 'a' %}"), ("refuses", "loader")),
  BadInput("a division by zero", template("{{ 1 // (1 - 1) }}"), ("ZeroDivisionError",)),
  BadInput("another type", template("{{ messages + 1 }}"), ("TypeError",)),
  BadInput("private attributes", template("{{ messages.__class__.__mro__ }}"), ("SecurityError",)),
  BadInput("a large range", template("{{ range(10**9) | list }}"), ("OverflowError", "Range")),
  BadInput(
    "a loop without end",
    within_a_second(
      template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    ),
    ("did not end within 0.1 seconds",),
  ),
  BadInput("a long text", template("{{ 'a' * (10**7 + 1) }}"), ("10,000,001", "at most")),
  BadInput("a very long text", template("{{ 'a' * 10**10 }}"), ("MemoryError",)),
  BadInput(
    "blocks nested deeply",
    template("{% if 1 %}" * 500 + "{% endif %}" * 500),
    ("the chat template does not compile",),
  ),
  BadInput(
    "a recursion", template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"), ("Recursion",)
  ),
  BadInput(
    "a variable that is not JSON", template("a", tools=[object()]), ("values of JSON", "object")
  ),
  BadInput("no messages", template("a", []), ("expected messages, got none",)),
  BadInput("one message alone", template("a", USER), ("list of messages", "dict")),
  BadInput("a number for a content", template("a", [{**USER, "content": 1}]), ("content", "1")),
  BadInput("a number for a role", template("a", [{**USER, "role": 1}]), ("role", "1")),
  BadInput(
    "an answer to nothing", template("a", TURNS[1:], chat_parts), ("before the assistant's first",)
  ),
  BadInput(
    "a prompt that is not a prefix of the chat",
    template(
      "{% for m in messages %}B:{{ m.content }}{% endfor %}" + QUESTION_END, TURNS, chat_parts
    ),
    ("message 1", "'B:HiA:'", "'B:HiB:Yes'", "add_generation_prompt"),
  ),
  BadInput(
    "an earlier prompt that is not a prefix of a later one",
    template("{{ messages | length }}" + QUESTION_END, [*TURNS, USER], prompt_parts),
    ("message 1", "'1A:'", "'3A:'"),
  ),
  BadInput(
    "earlier turns that are rewritten",
    template("{{ messages | length }}", TURNS + TURNS, chat_parts),
    ("message 1", "'1'", "'2'"),
  ),
  BadInput(
    "an answer that does not begin its block",
    template(
      "Hi{% if messages | length > 1 %} A:{% generation %}a{% endgeneration %}{% endif %}",
      TURNS,
      chat_parts,
    ),
    ("begins only after ' A:'", "add_generation_prompt"),
  ),
  BadInput(
    "a forged mark",
    template(
      "{% generation %}{{ messages[0].content }}{% endgeneration %}",
      [{**USER, "content": "\ufdd0"}],
      chat_parts,
    ),
    ("U+FDD0",),
  ),
  BadInput(
    "answers that are changed",
    lambda _: text_after_answers(ChatTemplate("{{ messages[-1].content | upper }}")),
    ("does not write the answer",),
  ),
]
