"""The E2E experiment on other language models: their files, prompt formats and rounded weights."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gpt2_e2e
from experiments.configs import gpt2_e2e as configs
from experiments.configs import (
  gpu_queue,
  smollm2_finals,
  smollm2_frozen,
  smollm2_prompts,
  smollm2_rates,
  smollm2_served,
)
from experiments.harness.config import read_config, replace_fields
from experiments.harness.launch import apply, sweep_runs
from experiments.nlg import prompts
from experiments.nlg.base import Base
from experiments.nlg.config import E2EConfig
from experiments.nlg.rounding import rounded
from experiments.nlg.tasks.e2e import official_groups, tokenized
from experiments.nlg.user_data import load_text
from lora_jax.data.sets import e2e
from lora_jax.decoding import from_linen
from lora_jax.models.checkpoints.pretrained import cached_path
from lora_jax.models.llama.folder import save_llama
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.models.zoo import plan_causal_lm

from tests.served import tiny_models
from tests.tiny_e2e import EMBEDDED, tiny_config

TEMPLATE = (
  "{% for m in messages %}<|1|>{{ m.role }}\n{{ m.content }}<|0|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|1|>assistant\n{% endif %}"
)
RECORDS = [
  e2e.Record("name : Aromi | Type : pub", "Aromi is a pub ."),
  e2e.Record("name : Cotto", "It is Cotto ."),
]


@pytest.fixture
def gguf(tmp_path, monkeypatch):
  """The GGUF file of a tiny Llama with a chat template, and room for E2E's texts in bytes."""
  long = dataclasses.replace(tiny_models.CONFIGS["llama"], num_positions=512, mlp_dim=64)
  monkeypatch.setitem(tiny_models.CONFIGS, "long", long)
  monkeypatch.setitem(tiny_models.TOKENIZER, "tokenizer.chat_template", TEMPLATE)
  return tiny_models.make_tiny(tmp_path, "long").path


def short(workdir, folder, **changes):
  config = tiny_config(workdir)
  config.model.folder = str(folder)
  config.data.update({"num_train_records": 8, "num_valid_records": 4, "batch_size": 2})
  config.fit.num_train_steps = 2
  config.lora.target = "all-linear"
  config.optimizer.update({"warmup_steps": 0, "warmup_share": 0.5})
  config.decoding.update({"num_inputs": 2, "max_new_tokens": 4, "official_references": True})
  return apply(config, changes)


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "frozen_base"])
def test_a_gguf_file_with_chats_and_quantized_weights(gguf, method, tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", "")  # METEOR takes seconds to start
  changes = {"data.prompt": "chat", "model.param_dtype": "int8", "method": method}
  lengths = {"data.row_length": 512, "data.loss_length": 384, "decoding.num_shots": 1}
  result = gpt2_e2e.run(short(tmp_path / "run", gguf, **changes, **lengths))
  assert np.isfinite(result["valid_loss"])
  assert result["base_parameters"] == 2 * 272 * 32 + 2 * (32 * 96 + 3 * 32 * 64 + 64) + 32
  assert result["scores"]["slot_error_rate"] >= 0
  assert result["official_scores"]["bleu"] >= 0
  assert result["slot_errors"]["slots"] == 6
  if method == "lora":
    assert result["trainable_parameters"] > 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert len(re.findall("train/loss", metrics)) == 2


@pytest.mark.long
def test_a_folder_of_llama(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", "")
  model = LlamaConfig(8192, 256, 32, 2, 4, num_kv_heads=2, mlp_dim=64)
  params = jax.jit(Llama(model).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  save_llama(tmp_path / "model", model, params, tokenizer_from=EMBEDDED, end_of_text_id=0)
  changes = {"data.prompt": "newline", "model.rounded_to": "Q4_0"}
  result = gpt2_e2e.run(short(tmp_path / "run", tmp_path / "model", **changes))
  assert np.isfinite(result["valid_loss"])
  other = short(tmp_path / "other", tmp_path / "model", **changes, **{"model.start": "random"})
  assert gpt2_e2e.run(apply(other, {"model.rounded_to": ""}))["valid_loss"] > 8


@pytest.mark.parametrize("prompt", ["separator", "newline", "chat"])
def test_a_prompt_is_the_start_of_its_example(gguf, prompt):
  model = plan_causal_lm(gguf)
  decoder = from_linen(model.module, model.init_cache, model.num_slots)
  base = Base(model, load_text(model, prompt == "chat"), prompt, decoder)
  end = base.end_of_text
  asked = prompts.encode_prompts(base, [record.context for record in RECORDS])
  for record, ids, example in zip(RECORDS, asked, prompts.encode(base, RECORDS, 512), strict=True):
    assert list(example.tokens[: len(ids)]) == ids
    assert example.target_index[0] == len(ids) - 1
    assert end in example.targets
    answer = base.tokenizer.decode(list(example.targets))
    assert answer.strip() == record.completion
  shot, context = RECORDS
  solved = prompts.encode_prompts(base, [context.context], [shot])[0]
  text = base.tokenizer.decode(solved, skip_special_tokens=False)
  assert text.index(shot.context) < text.index(shot.completion) < text.index(context.context)
  assert solved[-len(asked[1]) :][-5:] == asked[1][-5:]
  assert prompts.end_ids(base)[0] == end
  line_break = base.tokenizer.encode("\n", add_special_tokens=False).ids[0]
  assert (line_break in prompts.end_ids(base)) == (prompt != "separator")
  between = {"separator": base.tokenizer.id_to_token(end) + " ", "newline": "\n"}
  if prompt in between:
    whole = base.tokenizer.decode(list(example.tokens), skip_special_tokens=False)
    assert whole == context.context + between[prompt] + context.completion
  lines = {"separator": "a pub . It"}
  assert prompts.as_line(base, " a pub .\nIt\n\n1") == lines.get(prompt, "a pub .")


def test_lines_like_the_references():
  assert tokenized("Aromi's £20-25, kid-friendly (it isn't).") == (
    "Aromi 's £ 20 - 25 , kid - friendly ( it is n't ) ."
  )
  for record in e2e.read("test")[::100]:
    assert tokenized(record.completion) == " ".join(record.completion.split())


def test_official_references_belong_to_the_same_inputs():
  groups = e2e.grouped(e2e.read("test"))[::90]
  for ours, theirs in zip(groups, official_groups(groups, "test"), strict=True):
    assert len(ours.references) == len(theirs.references)
  with pytest.raises(ValueError, match="1 of 1 inputs are not in the official test file"):
    official_groups([e2e.Group("name : Nobody", ("x",))], "test")


def test_rounding_changes_linear_weights_only():
  kernel = jax.random.normal(jax.random.key(0), (2, 64, 5))
  params = {"h": {"attn": {"query": {"kernel": kernel}}}, "embedding": kernel}
  assert rounded(params, "") is params
  errors = []
  for name in ("Q8_0", "rtn3", "rtn2"):
    result = rounded(params, name)
    np.testing.assert_array_equal(result["embedding"], kernel)
    errors.append(float(jnp.abs(result["h"]["attn"]["query"]["kernel"] - kernel).mean()))
  assert 0 < errors[0] < errors[1] < errors[2] < 0.4
  low = kernel.reshape(2, 2, 32, 5).min(2)  # a block is 32 inputs of one output
  two = rounded(params, "rtn2")["h"]["attn"]["query"]["kernel"].reshape(2, 2, 32, 5)
  np.testing.assert_allclose(two.min(2), low, rtol=1e-3)
  with pytest.raises(ValueError, match=r"rounds blocks of 32 inputs, and .* has 5"):
    rounded({"h": {"attn": {"query": {"kernel": kernel[0].T}}}}, "rtn2")


def test_a_warmup_that_is_a_share_of_the_steps():
  config = read_config(E2EConfig, configs.get_config("smollm2"))
  assert gpt2_e2e.with_warmup(config, 232).optimizer.warmup_steps == 5
  assert gpt2_e2e.with_warmup(config, 10).optimizer.warmup_steps == 1
  mini = read_config(E2EConfig, configs.get_config())
  assert gpt2_e2e.with_warmup(mini, 232) is mini


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"optimizer.warmup_steps": 3}, "warmup_share=0.02 and optimizer.warmup_steps=3 exclude"),
    ({"model.param_dtype": "int8", "model.start": "random"}, "int8 is for pretrained weights"),
    ({"model.param_dtype": "stored", "model.rounded_to": "nf4"}, "Set model.param_dtype=float32"),
    ({"data.prompt": "tab"}, "data.prompt must be one of separator, newline, chat"),
    ({"decoding.num_shots": -1}, "decoding.num_shots"),
    ({"model.rounded_to": "Q4_K"}, "model.rounded_to must be one of"),
  ],
)
def test_settings_that_do_not_fit(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    replace_fields(read_config(E2EConfig, configs.get_config("smollm2")), changes)


def test_the_sweeps_of_smollm2(monkeypatch):
  monkeypatch.setattr(smollm2_rates, "BEST", dict.fromkeys(smollm2_rates.ARMS, 1e-3))
  modules = (smollm2_prompts, smollm2_rates, smollm2_frozen, smollm2_served, smollm2_finals)
  counts = []
  for module in (*modules, gpu_queue):
    runs = sweep_runs(module, module.get_config(), module.get_config(), set())
    counts.append(len(runs))
    assert len({run.workdir for run in runs}) == len(runs)
    for run in runs:
      read_config(E2EConfig, run)
  assert counts == [6, 20, 4, 14, 11, 127]
  monkeypatch.setitem(smollm2_rates.BEST, "full", None)
  with pytest.raises(
    ValueError, match=r"the learning rate of full is not known yet: run the sweep"
  ):
    list(smollm2_finals.sweep(smollm2_finals.get_config()))


def test_the_gpu_queue_has_the_papers_studies_on_whole_data_sets():
  default = gpu_queue.get_config()
  runs = sweep_runs(gpu_queue, default, default, set())
  names = list(dict.fromkeys(run.data.name for run in runs))
  assert names == ["e2e", "webnlg", "wikisql", "mnli_text", "samsum", "dart_dev"]
  webnlg = [run for run in runs if run.data.name == "webnlg"]
  assert {run.method for run in webnlg} == {
    *("full_finetuning", "lora", "adapter_l", "prefix_layer", "frozen_base")
  }
  (lora,) = (run for run in webnlg if run.method == "lora" and run.seed == 2)
  assert (lora.lora.rank, lora.optimizer.learning_rate) == (
    4,
    smollm2_rates.BEST["LoRA, rank 4, q,v"],
  )
  assert (lora.data.num_train_records, lora.decoding.num_inputs) == (0, 1862)
  nulls = [r for r in runs if r.data.shuffled_completions or r.model.start == "random"]
  assert [run.lora.rank for run in nulls] == [8, 64] * 2
  largest = [run for run in runs if run.lora.rank == 576]
  same_weights = [run for run in runs if run.lora.target == largest[0].lora.target]
  assert sorted(run.lora.rank for run in same_weights) == sorted([1, 4, 64, 576] * 3)


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_only_the_queues_last_layers_are_unrolled(size):
  """`top_layers` refuses scanned ones; `tiny` checks the runs as `full` does them."""
  default = gpu_queue.get_config(size)
  runs = sweep_runs(gpu_queue, default, default, set())
  unrolled = [run.method for run in runs if not run.model.scan_layers]
  assert unrolled == ["top_layers"] * 3
  assert len([run for run in runs if run.method == "top_layers"]) == 3


def test_the_gpu_queue_has_learning_rates_with_the_alpha_of_their_sweep(monkeypatch):
  """Or with the scaling of that sweep, at other ranks."""
  rates = {arm: 1e-3 * 2**i for i, arm in enumerate(smollm2_rates.ARMS)}
  monkeypatch.setattr(smollm2_rates, "BEST", rates)

  def settings(run):
    return run.lora.target, run.lora.rank, run.lora.alpha, run.optimizer.learning_rate

  swept = smollm2_rates.get_config()
  tuned = [
    settings(apply(swept, {**changes, "optimizer.learning_rate": rates[arm]}))
    for arm, changes in smollm2_rates.ARMS.items()
    if arm.startswith("LoRA")
  ]
  scaling = swept.lora.alpha / swept.lora.rank
  default = gpu_queue.get_config()
  runs = sweep_runs(gpu_queue, default, default, set())
  unknown = [
    (run.data.name, *settings(run))
    for run in runs
    if run.method == "lora" and settings(run) not in tuned
    if settings(run)[2:] != (scaling * run.lora.rank, rates["LoRA, rank 16"])
  ]
  assert not unknown


def test_smollm2_is_named_by_its_remedy(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert not cached_path("smollm2").exists()
  config = configs.get_config("smollm2")
  config.workdir = str(tmp_path / "run")
  with pytest.raises(FileNotFoundError, match="Fetch it once: make smollm2"):
    gpt2_e2e.run(config)
