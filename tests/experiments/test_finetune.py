"""The finetune experiment: a user's data and model in, an adapter for other packages out."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from experiments import export, finetune
from experiments.configs.finetune import get_config
from experiments.harness.config import read_config
from experiments.harness.launch import apply
from experiments.nlg.config import FinetuneConfig
from experiments.nlg.user_data import load_data
from experiments.report import report
from lora_jax.data.sets.e2e_tfds import load
from lora_jax.interop import load_peft
from lora_jax.models.llama.folder import save_llama
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.models.parts.mixture import MixtureConfig
from lora_jax.models.text.chat import load_chat_template
from lora_jax.models.text.tokenizer import load_tokenizer
from lora_jax.models.zoo import load_causal_lm
from lora_jax.training.checkpoint import restore_adapter
from lora_jax.training.loop import evaluate_loss
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh
from lora_jax.training.metrics_log import read_metrics
from lora_jax.training.step import make_eval_step, make_train_step

from tests.make_tokenizer_golden import GOLDEN
from tests.tiny_e2e import EMBEDDED, chat_folder, tiny_folder
from tests.tiny_training import interrupted_at
from tests.toy_models import relative_difference

TOKENS = jnp.asarray([[5, 17, 300, 4000, 2, 9]])
CHAT_TEMPLATE = (
  "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant: {% endif %}"
)

OWN_TEMPLATE = f"Chat\n{CHAT_TEMPLATE}"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
  """The tiny GPT-2, with a chat template."""
  return chat_folder(tmp_path_factory.mktemp("chat"), CHAT_TEMPLATE)


def write_lines(path, chats=False, count=60):
  records = load("train")
  with path.open("w") as file:
    for record in records[:: len(records) // count]:
      line = {"prompt": record.context + "\n", "completion": record.completion}
      if chats:
        roles = {"user": line["prompt"], "assistant": line["completion"]}
        line = {"messages": [{"role": role, "content": roles[role]} for role in roles]}
      file.write(json.dumps(line) + "\n")
  return path


def config_of(model, data, workdir):
  config = get_config()
  changes = {
    "workdir": str(workdir),
    "model.folder": str(model),
    "data.file": str(data),
    "data.num_epochs": 1,
    "data.batch_size": 4,
    "lora.rank": 4,
    "optimizer.learning_rate": 3e-2,
    "optimizer.warmup_steps": 2,
    "fit.log_every_steps": 1,
    "samples.count": 2,
    "samples.max_new_tokens": 6,
  }
  return apply(config, changes)


def finished_run(chat_model, folder, chats):
  data = write_lines(folder / "mine.jsonl", chats)
  config = config_of(chat_model, data, folder / "run")
  if chats:
    config.data.chat_template = str(folder / "mine.jinja")
    (folder / "mine.jinja").write_text(OWN_TEMPLATE)
  return config, finetune.run(config)


@pytest.fixture(scope="module")
def completions(chat_model, tmp_path_factory):
  return finished_run(chat_model, tmp_path_factory.mktemp("completions"), chats=False)


@pytest.fixture(scope="module")
def chats(chat_model, tmp_path_factory):
  return finished_run(chat_model, tmp_path_factory.mktemp("chats"), chats=True)


@pytest.mark.long
def test_a_model_with_a_sliding_window_over_several_devices(tmp_path):
  """Prompts are longer than the window, and as many are answered at once as devices share rows."""
  config = LlamaConfig(
    vocab_size=8192,
    num_positions=256,
    embed_dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=64,
    sliding_window=24,
  )
  params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  save_llama(tmp_path / "model", config, params, tokenizer_from=EMBEDDED, end_of_text_id=0)
  data = write_lines(tmp_path / "mine.jsonl", count=20)
  changes = {"mesh.data": 2, "mesh.fsdp": 2, "samples.count": 1}
  run = apply(config_of(tmp_path / "model", data, tmp_path / "run"), changes)
  result = finetune.run(run)
  assert len(result["samples"]) == 1
  model = load_causal_lm(tmp_path / "model")
  assert model.model_type == "mistral"
  lora_config, adapter = load_peft(tmp_path / "run" / "peft", model.stored, model.params)
  adapted = lj.lora(model.call, lora_config).apply(model.params, adapter, TOKENS)
  assert relative_difference(model.call(model.params, TOKENS), adapted) > 1e-3
  export.main([str(tmp_path / "run"), str(tmp_path / "merged"), "--merged"])
  merged = load_causal_lm(tmp_path / "merged")
  assert relative_difference(merged.call(merged.params, TOKENS), adapted) < 1e-5
  (tmp_path / "run" / "result.json").rename(tmp_path / "run" / "result_before.json")
  file = tmp_path / "model" / "config.json"
  written = file.read_text()
  file.write_text(json.dumps(json.loads(written) | {"rms_norm_eps": 0.1}))
  with pytest.raises(ValueError, match=r"was started with other model, by its config\.json"):
    finetune.run(run)
  file.write_text(written)
  weights = tmp_path / "model" / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-1] + b"@")
  with pytest.raises(ValueError, match=r"was started with other weights .*it has changed since"):
    finetune.run(run)
  (tmp_path / "run" / "result_before.json").rename(tmp_path / "run" / "result.json")
  with pytest.raises(SystemExit, match=r"was trained on other weights than .*model\.safetensors"):
    export.main([str(tmp_path / "run"), str(tmp_path / "other"), "--merged"])


@pytest.mark.long
def test_a_mixture_of_experts_with_a_sentencepiece_tokenizer(tmp_path, capsys):
  """Its experts are adapted too, for which servers have no names."""
  tokenizer = shutil.copytree(GOLDEN / "llama", tmp_path / "tokenizer")
  (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
  config = LlamaConfig(
    vocab_size=load_tokenizer(tokenizer).get_vocab_size(),
    num_positions=256,
    embed_dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=48,
    mixture=MixtureConfig(num_experts=4, experts_per_token=2),
  )
  params = Llama(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  save_llama(tmp_path / "model", config, params, tokenizer_from=tokenizer, end_of_text_id=2)
  data = write_lines(tmp_path / "mine.jsonl", count=20)
  run = apply(config_of(tmp_path / "model", data, tmp_path / "run"), {"samples.count": 1})
  run.lora.target += "|.*/mlp/experts/(gate|up|down)"
  result = finetune.run(run)
  assert result["valid_loss"] < math.log(config.vocab_size) - 0.02
  assert "# in PEFT" in (out := capsys.readouterr().out)
  assert "vllm serve" not in out
  written = json.loads((tmp_path / "run" / "peft" / "adapter_config.json").read_text())
  assert sorted(written["target_parameters"]) == ["down_proj", "gate_up_proj"]
  model = load_causal_lm(tmp_path / "model")
  assert model.model_type == "mixtral"
  lora_config, adapter = load_peft(tmp_path / "run" / "peft", model.stored, model.params)
  adapted = lj.lora(model.call, lora_config).apply(model.params, adapter, TOKENS % 300)
  assert relative_difference(model.call(model.params, TOKENS % 300), adapted) > 1e-3
  export.main([str(tmp_path / "run"), str(tmp_path / "merged"), "--merged"])
  merged = load_causal_lm(tmp_path / "merged")
  assert relative_difference(merged.call(merged.params, TOKENS % 300), adapted) < 1e-5


def test_both_files_have_one_format(chat_model, tmp_path):
  first = write_lines(tmp_path / "first.jsonl", count=20)
  second = write_lines(tmp_path / "second.jsonl", chats=True, count=20)
  for data, valid in ((first, second), (second, first)):
    config = apply(config_of(chat_model, data, tmp_path / "run"), {"data.valid_file": str(valid)})
    with pytest.raises(ValueError, match=r"have two formats"):
      finetune.run(config)


@pytest.mark.parametrize("form", ["completions", "chats"])
def test_it_learns_and_answers(form, request):
  _, result = request.getfixturevalue(form)
  assert result["valid_loss"] < math.log(8192) - 0.02  # of the random weights' uniform guess
  assert result["num_train_records"] + result["num_valid_records"] >= 60
  assert len(result["samples"]) == 2
  assert all(sample["answer"] for sample in result["samples"])
  assert result["samples"][0]["prompt"].endswith(
    {"completions": "\n", "chats": "assistant: "}[form]
  )


def test_the_exported_adapter_is_the_trained_one(completions, chat_model):
  config, _ = completions
  model = load_causal_lm(chat_model)
  lora_config, loaded = load_peft(f"{config.workdir}/peft", model.stored, model.params)
  got = lj.lora(model.call, lora_config).apply(model.params, loaded, TOKENS)
  settings = {name: value for name, value in config.lora.items() if name != "tokens"}
  lora = lj.lora(model.call, lj.LoraConfig(**settings))
  trainable = restore_adapter(
    f"{config.workdir}/adapter", lora.init(jnp.zeros(2, jnp.uint32), model.params, TOKENS)
  )
  expected = lora.apply(model.params, trainable, TOKENS, lora_key=None)
  assert relative_difference(got, expected) < 1e-5
  assert relative_difference(model.call(model.params, TOKENS), expected) > 1e-2


def test_the_merged_model_is_the_adapted_one(completions, chat_model, tmp_path, capsys):
  config, _ = completions
  export.main([config.workdir, str(tmp_path / "merged"), "--merged"])
  assert "the base model's dtype" in capsys.readouterr().out
  model, merged = load_causal_lm(chat_model), load_causal_lm(tmp_path / "merged")
  lora_config, adapter = load_peft(f"{config.workdir}/peft", model.stored, model.params)
  expected = lj.lora(model.call, lora_config).apply(model.params, adapter, TOKENS)
  assert relative_difference(merged.call(merged.params, TOKENS), expected) < 1e-5
  with pytest.raises(SystemExit, match=r"has written it already: .*/peft"):
    export.main([config.workdir, str(tmp_path / "adapter")])


def test_exports_have_the_chat_template_and_end_tokens_of_the_training(chats, tmp_path):
  config, _ = chats
  peft = Path(config.workdir) / "peft"
  export.main([config.workdir, str(tmp_path / "merged"), "--merged"])
  for folder in (peft, tmp_path / "merged"):
    assert load_chat_template(folder).source == OWN_TEMPLATE
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written["chat_template"] == OWN_TEMPLATE
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0
    assert load_tokenizer(folder).get_vocab_size() == 8192
  file = peft / "chat_template.jinja"
  file.rename(tmp_path / file.name)
  with pytest.raises(SystemExit, match=r"lacks chat_template\.jinja, with which .*mine\.jinja"):
    export.main([config.workdir, str(tmp_path / "other"), "--merged"])
  (tmp_path / file.name).rename(file)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
def test_the_report_says_how_to_load_it(completions, capsys):
  config, result = completions
  reloaded = finetune.run(config)
  assert reloaded == json.loads(json.dumps(result))
  out = capsys.readouterr().out
  assert "is finished" in out
  folder = f"{config.workdir}/peft"
  names = {}
  here, in_peft = out.split("# here\n")[1].split("# in PEFT\n")
  exec(here, names)
  base = names["base"]
  assert names["adapted"].apply(base.params, names["adapter"], TOKENS).shape == (1, 6, 8192)
  assert "--max-lora-rank 16" in out  # 12 of the fused query, key and value
  assert f"--lora-modules mine={folder}" in out
  pytest.importorskip("peft", reason="the lines for PEFT need it")
  import torch

  exec(in_peft, names)
  with torch.no_grad():
    peer_logits = names["model"](torch.tensor(np.asarray(TOKENS))).logits.numpy()
  logits = names["adapted"].apply(base.params, names["adapter"], TOKENS)
  assert relative_difference(jnp.asarray(peer_logits), logits) < 1e-5


def test_an_interrupted_run_resumes_to_the_same_bits(completions, tmp_path, monkeypatch):
  """It is interrupted during training, and once more after it."""
  config, result = completions
  step = result["num_train_steps"] // 2
  other = apply(config, {"workdir": str(tmp_path / "again"), "fit.checkpoint_every_steps": step})
  with interrupted_at(step):
    finetune.run(other)

  class Broken(Exception):
    pass

  def fails(*_):
    raise Broken

  monkeypatch.setattr(finetune, "export", fails)
  with pytest.raises(Broken):
    finetune.run(other)
  monkeypatch.undo()
  losses = [
    [metrics["train/loss"] for metrics in read_metrics(path) if "train/loss" in metrics]
    for path in (Path(run.workdir) / "metrics.jsonl" for run in (config, other))
  ]
  assert losses[0] == losses[1]
  assert len(losses[0]) > 1
  resumed = finetune.run(other)
  assert resumed["valid_loss"] == result["valid_loss"]
  assert resumed["samples"] == result["samples"]
  assert resumed["train_tokens"] == 0  # in this session


def test_data_that_has_changed_since_a_run_was_finished(completions):
  config, result = completions
  data = Path(config.data.file)
  before = data.read_text()
  data.write_text(before + before)
  with pytest.raises(ValueError, match=r"was started with other data .* it has changed since"):
    finetune.run(config)
  data.write_text(before)
  assert finetune.run(config)["valid_loss"] == result["valid_loss"]


def test_runs_are_compared(completions, tmp_path):
  config, result = completions
  other = tmp_path / "run"
  other.mkdir()
  stored = json.loads((Path(config.workdir) / "config.json").read_text())
  stored["optimizer"]["learning_rate"] = 1e-3
  (other / "config.json").write_text(json.dumps(stored))
  (other / "result.json").write_text(json.dumps(result | {"valid_loss": 9.0}))
  text = report([config.workdir, other], tmp_path / "report")
  assert "| LoRA, rate 0.001 |" in text
  by_rate = text.split("## By learning rate")[1]
  assert f"**{result['valid_loss']:.3f}**" in by_rate
  assert "9.000" in by_rate


def test_data_may_be_corrected_before_training(chat_model, tmp_path):
  data = write_lines(tmp_path / "mine.jsonl", count=20)
  lines = data.read_text()
  data.write_text(lines + "{}")
  config = apply(config_of(chat_model, data, tmp_path / "run"), {"samples.count": 0})
  with pytest.raises(ValueError, match=r"mine.jsonl:"):
    finetune.run(config)
  data.write_text(lines)
  assert finetune.run(config)["num_train_steps"] > 0


def test_a_dry_run_needs_no_weights(chat_model, tmp_path):
  bare = tmp_path / "model"
  bare.mkdir()
  for file in chat_model.iterdir():
    if file.suffix != ".safetensors":
      (bare / file.name).symlink_to(file)
  data = write_lines(tmp_path / "mine.jsonl")
  command = [sys.executable, "-m", "experiments.finetune", f"--model={bare}", f"--data={data}"]
  done = subprocess.run([*command, "--dry_run"], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "layers" not in done.stdout
  for line in (
    r"h_{0\.\.1}/mlp/down/kernel x2 +128 x 32 +128 x 16",
    r"model +/.*model: gpt2, 295,808 parameters",
    r"method +LoRA, rank 16, 18,432 parameters \(\d+\.\d\d %\)",
    r"steps +\d+ in 3 epochs, each of 8 rows of \d+ tokens, packed",
    r"note +\d+ steps change little: raise data\.num_epochs",
    r"memory +0\.\d\d GB per device by the compiler's estimate",
    r"nothing was trained",
  ):
    assert re.search(line, done.stdout), (line, done.stdout)
  assert not list(tmp_path.glob("runs"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"lora.target": "wte/embedding"}, "wte is the head too"),
    ({"model.folder": ""}, "no model is given: add --model"),
    ({"data.file": ""}, "no data is given: add --data"),
    ({"fit.keep": "first"}, r"fit\.keep must be one of best, last"),
    ({"data.valid_share": 1.0}, r"valid_share must be a finite number in \(0, 1\), got 1\.0"),
    ({"data.today": "26 Jul"}, "data.today must be a date such as 2024-07-26"),
    ({"lora.target": r".*/attn/qurey/kernel"}, "h_0/attn/query/kernel"),
    ({"lora.rank": 33}, "rank 33"),
    ({"data.row_length": 8}, "examples have more than 8 tokens, .*mine.jsonl:1"),
  ],
)
def test_bad_values_are_refused(changes, message, chat_model, tmp_path):
  data = write_lines(tmp_path / "mine.jsonl", count=20)
  config = apply(config_of(chat_model, data, tmp_path / "run"), changes)
  with pytest.raises(ValueError, match=message):
    finetune.run(config)


def test_chats_without_a_template_or_with_one_that_refuses(chat_model, tmp_path):
  data = write_lines(tmp_path / "mine.jsonl", chats=True, count=20)
  with pytest.raises(FileNotFoundError, match=r"no chat template|tokenizer_config"):
    finetune.run(config_of(tiny_folder(), data, tmp_path / "run"))
  with data.open("a") as file:
    messages = [{"role": "assistant", "content": "I begin"}, {"role": "user", "content": "Oh"}]
    file.write(json.dumps({"messages": messages}) + "\n")
  count = len(data.read_text().splitlines())
  with pytest.raises(ValueError, match=f"mine.jsonl:{count}: expected a message before"):
    finetune.run(config_of(chat_model, data, tmp_path / "run2"))


def test_too_few_examples(chat_model, tmp_path):
  data = tmp_path / "mine.jsonl"
  data.write_text('{"prompt": "a", "completion": "b"}')
  with pytest.raises(ValueError, match="has 1 different prompts, of which 1 are held out"):
    finetune.run(config_of(chat_model, data, tmp_path / "run"))


@pytest.mark.long
@pytest.mark.parametrize(
  ("method", "fields", "written"),
  [
    ("trainable_tokens", {"lora.tokens": ("<|endoftext|>", " food")}, "peft"),
    ("lora", {"lora.tokens": (0,)}, "peft"),
    ("ln_tuning", {}, "peft"),
    ("loha", {}, "model"),  # PEFT has none for GPT-2
  ],
)
def test_other_methods_are_written_for_peft_if_it_has_them(
  method, fields, written, chat_model, tmp_path, capsys
):
  data = write_lines(tmp_path / "mine.jsonl", count=20)
  config = apply(config_of(chat_model, data, tmp_path / "run"), {"method": method, **fields})
  finetune.plan(config)
  finetune.run(config)
  out, names = capsys.readouterr().out, {}
  assert {"peft", "model"} & {path.name for path in (tmp_path / "run").iterdir()} == {written}
  assert "vllm" not in out
  exec(out.split("# here\n")[1].split("# in ")[0], names)
  if written == "model":
    with pytest.raises(SystemExit, match=r"has written it already: .*/model"):
      export.main([config.workdir, str(tmp_path / "merged"), "--merged"])
    return
  base = names["base"]
  expected = names["adapted"].apply(base.params, names["adapter"], TOKENS)
  assert relative_difference(base.call(base.params, TOKENS), expected) > 1e-4
  export.main([config.workdir, str(tmp_path / "merged"), "--merged"])
  merged = load_causal_lm(tmp_path / "merged")
  assert relative_difference(merged.call(merged.params, TOKENS), expected) < 1e-5


@pytest.mark.long
def test_full_finetuning_leaves_a_model(chat_model, tmp_path, capsys):
  data = write_lines(tmp_path / "mine.jsonl", count=20)
  changes = {"method": "full_finetuning", "optimizer.learning_rate": 3e-3, "samples.count": 1}
  config = apply(config_of(chat_model, data, tmp_path / "run"), changes)
  result = finetune.run(config)
  assert result["trainable_parameters"] == result["base_parameters"] == 295_808
  assert len(result["samples"]) == 1
  assert not (tmp_path / "run" / "adapter").exists()
  names, out = {}, capsys.readouterr().out
  exec(out.split("# here\n")[1].split("# in transformers")[0], names)
  trained, base = names["model"], load_causal_lm(chat_model)
  assert relative_difference(base.call(base.params, TOKENS), trained.call(trained.params, TOKENS))
  text, held_out = load_data(read_config(FinetuneConfig, config), trained)
  loss = lj.full_finetuning(language_model_loss(trained.module))
  params = trained.params
  measured = evaluate_loss(make_eval_step(loss), params, params, iter(held_out.valid), make_mesh())
  assert measured == pytest.approx(result["valid_loss"], rel=1e-5)
  assert text.tokenizer.get_vocab_size() == 8192
  settings = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
  assert settings == {"eos_token_id": 0}
  assert finetune.run(config) == json.loads(json.dumps(result))
  for flags in ([], ["--merged"]):
    with pytest.raises(SystemExit, match=r"has written it already: .*/model"):
      export.main([config.workdir, str(tmp_path / "out"), *flags])
  finetune.plan(config)
  assert re.search(r"method +full fine-tuning, 295,808 parameters \(100", capsys.readouterr().out)


@pytest.mark.parametrize("method", ["full_finetuning", "lora", "dora"])
def test_a_dry_run_allocates_nothing_large(method, chat_model, tmp_path, monkeypatch):
  """It sees the arrays when the step is compiled, while the optimizer's state is held."""
  sizes = []

  def seen(loss, optimizer, state, parts):
    sizes.extend(leaf.size for leaf in jax.live_arrays() if id(leaf) not in before)
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    assert sum(leaf.size for leaf in arrays) < 10
    return make_train_step(loss, optimizer, state, parts)

  monkeypatch.setattr(finetune, "make_train_step", seen)
  data = write_lines(tmp_path / "mine.jsonl", count=20)
  config = apply(config_of(chat_model, data, tmp_path / "run"), {"method": method})
  before = {id(leaf) for leaf in jax.live_arrays()}
  finetune.plan(config)
  assert sizes
  assert max(sizes) < 1000


@pytest.mark.long
def test_a_variant_of_lora(chat_model, tmp_path, capsys):
  """It needs only its row, and a dry run needs no weights."""
  data = write_lines(tmp_path / "mine.jsonl", count=20)
  changes = {"method": "dora", "lora.target": "all-linear", "samples.count": 1}
  config = apply(config_of(chat_model, data, tmp_path / "run"), changes)
  finetune.plan(config, all_rows=True)
  out = capsys.readouterr().out
  assert re.search(r"method +DoRA, rank 4, 5,184 parameters", out)  # a magnitude for each output
  assert re.search(r"^h_1/mlp/down/kernel +128 x 32 +128 x 4", out, re.MULTILINE)
  assert finetune.run(config)["trainable_parameters"] == 5184
  out = capsys.readouterr().out
  assert "vllm" not in out
  names = {}
  exec(out.split("# here\n")[1].split("# in PEFT")[0], names)
  base = names["base"]
  expected = names["adapted"].apply(base.params, names["adapter"], TOKENS)
  assert relative_difference(base.call(base.params, TOKENS), expected) > 1e-3
  export.main([config.workdir, str(tmp_path / "merged"), "--merged"])
  merged = load_causal_lm(tmp_path / "merged")
  assert relative_difference(merged.call(merged.params, TOKENS), expected) < 1e-5
