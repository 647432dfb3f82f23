"""Exported folders tokenize, render chats and stop as in training, in `transformers` too."""

import json
import shutil

import pytest

from experiments.nlg.text_files import text_files, write_with
from experiments.nlg.user_data import end_token_id, generation_end_ids
from lora_jax.models.text.chat import ChatTemplate, load_chat_template, render_chat
from lora_jax.models.text.tokenizer import load_tokenizer, read_special_tokens

from tests.gguf_vocabularies import write_vocabulary
from tests.tiny_e2e import EMBEDDED, tiny_folder

END = "<|endoftext|>"
USER_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{{ eos_token }}\n"
  "{% endfor %}"
  "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
BASE = "B {{ messages[0].content }}{{ eos_token }}"
NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": BASE}]
MESSAGES = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Yo"}]
CASES = {  # tokenizer_config.json, other files, the user's own template
  "own": (None, {}, USER_TEMPLATE),
  "own instead of the config's": ({"eos_token": END, "chat_template": BASE}, {}, USER_TEMPLATE),
  "own instead of a file": ({"eos_token": END}, {"chat_template.jinja": BASE}, USER_TEMPLATE),
  "own instead of several": ({"eos_token": END, "chat_template": NAMED}, {}, USER_TEMPLATE),
  "own with special_tokens_map.json": (
    None,
    {"special_tokens_map.json": json.dumps({"eos_token": END, "bos_token": END})},
    USER_TEMPLATE,
  ),
  "of the config": ({"tokenizer_class": "GPT2Tokenizer", "chat_template": BASE}, {}, None),
  "of a file": ({"eos_token": {"content": END}}, {"chat_template.jinja": BASE}, None),
  "of several": ({"eos_token": END, "chat_template": NAMED}, {}, None),
  "of a file, not of the config": ({"chat_template": "no"}, {"chat_template.jinja": BASE}, None),
}


@pytest.fixture(params=CASES)
def exported(request, tmp_path):
  """Returns an adapter's folder, a merged folder, and a training's tokenizer and template."""
  config, files, user_template = CASES[request.param]
  base = shutil.copytree(tiny_folder(), tmp_path / "base")
  (base / "tokenizer_config.json").unlink(missing_ok=True)
  if config is not None:
    (base / "tokenizer_config.json").write_text(json.dumps(config))
  settings = {"temperature": 0.6, "do_sample": True, "eos_token_id": 0}
  for name, text in (files | {"generation_config.json": json.dumps(settings)}).items():
    (base / name).write_text(text)
  tokenizer = load_tokenizer(base)
  template = ChatTemplate(user_template) if user_template else load_chat_template(base)
  special = {"eos_token": END} | read_special_tokens(base)
  written = text_files(base, tokenizer, (0, 0, 5), user_template)
  write_with(written, tmp_path / "peft", lambda path: path.mkdir())
  write_with(written, tmp_path / "merged", lambda path: shutil.copytree(base, path))
  folders = tmp_path / "peft", tmp_path / "merged"
  return folders, tokenizer, ChatTemplate(template.source, special)


def test_a_folder_renders_and_stops_as_in_training(exported):
  folders, tokenizer, template = exported
  expected = render_chat(template, MESSAGES, add_generation_prompt=True)
  ids = tokenizer.encode(expected).ids
  for folder in folders:
    assert render_chat(load_chat_template(folder), MESSAGES, True) == expected
    assert load_tokenizer(folder).encode(expected).ids == ids
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings == {"temperature": 0.6, "do_sample": True, "eos_token_id": [0, 5]}
  assert [path.name for path in folders[0].parent.iterdir() if path.name.startswith(".")] == []


def test_transformers_renders_and_stops_as_in_training(exported):
  transformers = pytest.importorskip("transformers", reason="the peer is not installed")
  folders, tokenizer, template = exported
  expected = render_chat(template, MESSAGES, add_generation_prompt=True)
  for folder in folders:
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    text = peer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == expected
    assert peer(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).ids
    assert peer.eos_token == END
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [0, 5]


def test_transformers_generates_up_to_the_same_end_tokens(tmp_path):
  transformers = pytest.importorskip("transformers", reason="the peer is not installed")
  import torch

  base, tokenizer = tiny_folder(), load_tokenizer(tiny_folder())
  load = transformers.AutoModelForCausalLM.from_pretrained
  prompt = torch.tensor([[5, 17, 300]])
  mask = torch.ones_like(prompt)

  def generate(folder):
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    return load(folder).generate(prompt, attention_mask=mask, **options)[0, 3:].tolist()

  tokens = generate(base)
  end_id = tokens[3]
  stop = tokens.index(end_id) + 1
  files = text_files(base, tokenizer, (0, end_id))
  write_with(files, tmp_path / "merged", lambda path: shutil.copytree(base, path))
  assert generate(tmp_path / "merged") == tokens[:stop]
  assert stop < len(tokens)


def test_a_tokenizer_of_another_format_is_kept_and_written_as_json(tmp_path):
  base = shutil.copytree(EMBEDDED, tmp_path / "base", ignore=shutil.ignore_patterns("*.safe*"))
  tokenizer = load_tokenizer(base)
  model = json.loads(tokenizer.to_str())["model"]
  (base / "tokenizer.json").unlink()
  merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
  (base / "vocab.json").write_text(json.dumps(model["vocab"]))
  (base / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
  reloaded = load_tokenizer(base)
  files = text_files(base, reloaded, (0,), USER_TEMPLATE)
  assert {"vocab.json", "merges.txt", "tokenizer.json", "chat_template.jinja"} <= set(files)
  write_with(files, tmp_path / "peft", lambda path: path.mkdir())
  text = "Is it näive? 42"
  assert load_tokenizer(tmp_path / "peft").encode(text).ids == reloaded.encode(text).ids


@pytest.mark.parametrize("name", ["smollm", "llama"])
def test_a_gguf_files_metadata_become_a_folders_files(name, tmp_path):
  base = write_vocabulary(name, tmp_path)
  tokenizer, rows = load_tokenizer(base), len(load_tokenizer(base).get_vocab())
  end_id, template = end_token_id(base, tokenizer), load_chat_template(base)
  end_ids = generation_end_ids(base, rows)
  assert end_ids[0] == end_id
  files = text_files(base, tokenizer, end_ids)
  write_with(files, tmp_path / "merged", lambda path: path.mkdir())
  folder = tmp_path / "merged"
  expected = render_chat(template, MESSAGES, add_generation_prompt=True)
  ids = tokenizer.encode(expected).ids
  assert load_tokenizer(folder).encode(expected).ids == ids
  assert render_chat(load_chat_template(folder), MESSAGES, True) == expected
  assert generation_end_ids(folder, rows) == end_ids
  transformers = pytest.importorskip("transformers", reason="the peer is not installed")
  peer = transformers.AutoTokenizer.from_pretrained(folder)
  text = peer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
  assert text == expected
  assert peer(text)["input_ids"] == ids
  ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
  assert ends == (end_ids if len(end_ids) > 1 else end_id)


def test_nothing_is_left_if_writing_fails(tmp_path):
  def fail(path):
    path.mkdir()
    raise OSError("a full disk")

  with pytest.raises(OSError, match="a full disk"):
    write_with({}, tmp_path / "new", fail)
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "new").mkdir()
  with pytest.raises(FileExistsError, match="nothing is overwritten"):
    write_with({}, tmp_path / "new", fail)
