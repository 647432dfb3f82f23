"""Tokens and end tokens of a user's data, without any weights."""

import json
import logging

import pytest

from experiments.configs.finetune import get_config
from experiments.harness.config import read_config
from experiments.harness.launch import apply
from experiments.nlg.config import FinetuneConfig
from experiments.nlg.user_data import chat_prompts, encode, load_data, load_text, prompts
from lora_jax.data.jsonl import read_jsonl
from lora_jax.models.zoo import plan_causal_lm

from tests.tiny_e2e import EMBEDDED

CHATML = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACED = (
  "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant: {% endif %}"
)
END = "<|endoftext|>"
CHATS = [[("user", f"number {i}"), ("assistant", "Hello there")] for i in range(8)]
TURNS = [*CHATS[0], ("user", "And now?"), ("assistant", " Bye \n")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model's folder without weights; three of its tokens are special, as models reserve some."""
  folder = tmp_path_factory.mktemp("model")
  (folder / "config.json").write_bytes((EMBEDDED / "config.json").read_bytes())
  tokenizer = json.loads((EMBEDDED / "tokenizer.json").read_text("utf-8"))
  names = dict(enumerate(("<|im_start|>", "<|im_end|>", "<|answer|>"), 8189))
  vocab = {names.get(i, token): i for token, i in tokenizer["model"]["vocab"].items()}
  merges = tokenizer["model"]["merges"]
  joined = ["".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in merges]
  merges = [pair for pair, token in zip(merges, joined, strict=True) if token in vocab]
  options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  added = [{"id": i, "content": name, "special": True, **options} for i, name in names.items()]
  tokenizer["model"] |= {"vocab": vocab, "merges": merges}
  tokenizer["added_tokens"] += added
  (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
  return folder


def config_of(folder, tmp_path, chats, template=CHATML, **changes):
  """Returns a config, and the model's plan, for conversations of (role, content)."""
  values = {"eos_token": END, "chat_template": template}
  (folder / "tokenizer_config.json").write_text(json.dumps(values))
  lines = [
    json.dumps({"messages": [{"role": role, "content": text} for role, text in chat]})
    for chat in chats
  ]
  (tmp_path / "mine.jsonl").write_text("\n".join(lines))
  changes |= {"model.folder": str(folder), "data.file": str(tmp_path / "mine.jsonl")}
  return read_config(FinetuneConfig, apply(get_config(), changes)), plan_causal_lm(folder)


def end_tokens(text):
  return {text.tokenizer.id_to_token(i) for i in text.end_ids}


def test_end_tokens_are_the_templates_whatever_the_examples_say(folder, tmp_path):
  answered = [[*chat[:1], ("assistant", "<|answer|> Paris")] for chat in CHATS]
  cut = [[("user", "a"), ("assistant", "Paris " * 40)], *CHATS]
  short = {"data.truncate": True, "data.row_length": 32}
  for chats, changes in ((CHATS, {}), (answered, {}), (cut, short)):
    text, _ = load_data(*config_of(folder, tmp_path, chats, **changes))
    assert end_tokens(text) == {END, "<|im_end|>"}


@pytest.mark.parametrize(
  ("eos_token_id", "expected"), [(None, set()), (8191, {"<|answer|>"}), ([0, 8191], {"<|answer|>"})]
)
def test_end_tokens_of_the_generation_config(eos_token_id, expected, folder, tmp_path):
  config, model = config_of(folder, tmp_path, CHATS)
  path = folder / "generation_config.json"
  path.write_text(json.dumps({"eos_token_id": eos_token_id}))
  try:
    assert end_tokens(load_text(model, True, config.data.chat_template)) == {
      END,
      "<|im_end|>",
      *expected,
    }
    assert end_tokens(load_text(model, False)) == {END, *expected}
  finally:
    path.unlink()


@pytest.mark.parametrize(
  ("after", "expected", "warns"),
  [
    ("<|im_end|>", {"<|im_end|>"}, False),
    ("\n <|im_end|><|answer|>", {"<|im_end|>"}, False),  # the first ends the turn
    ("{{ eos_token }}", set(), False),
    ("\n", set(), True),
    ("", set(), True),
  ],
)
def test_end_tokens_of_other_templates(after, expected, warns, folder, tmp_path, caplog):
  template = CHATML.replace("<|im_end|>\n", after)
  with caplog.at_level(logging.WARNING):
    config, model = config_of(folder, tmp_path, CHATS, template)
    text = load_text(model, True, config.data.chat_template)
  assert end_tokens(text) == {END, *expected}
  assert ("writes no special token after an answer" in caplog.text) == warns


@pytest.mark.parametrize("template", [CHATML, SPACED, SPACED.replace(": ", ":\n")])
def test_prompts_as_asked_are_prefixes_of_what_is_trained_on(template, folder, tmp_path):
  chats = [*CHATS, TURNS]
  config, model = config_of(folder, tmp_path, chats, template)
  text = load_text(model, True, config.data.chat_template)
  records = read_jsonl(config.data.file)
  for record, example, prompt in zip(
    records, encode(text, records, 64, truncate=False), prompts(text, records), strict=True
  ):
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert len(prompt) - 1 in example.target_index
    (first,) = chat_prompts(text, [record.messages[:1]])
    assert example.tokens[: len(first)].tolist() == first
    assert example.target_index[0] == len(first) - 1
  with pytest.raises(ValueError, match="expected a model with a chat template"):
    chat_prompts(text._replace(template=None), [records[0].messages])


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_another_day(folder, tmp_path):
  """It does not get the day of the run, so that a resumed run sees the same tokens."""
  dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
  config, model = config_of(folder, tmp_path, CHATS, dated)
  text, data = load_data(config, model)
  assert "26 Jul 2024" in text.tokenizer.decode(data.prompts[0])
  later, _ = config_of(folder, tmp_path, CHATS, dated, **{"data.today": "2025-01-02"})
  assert "02 Jan 2025" in text.tokenizer.decode(load_data(later, model)[1].prompts[0])
  assert load_data(config, model)[1].digest == data.digest
