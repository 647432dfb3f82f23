"""Exported runs compute the same as the run's own model, and have its tokenizer and end token."""

import dataclasses
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from experiments import export, finetune, gpt2_e2e
from experiments.configs.finetune import get_config
from experiments.harness.config import read_config
from experiments.harness.launch import apply
from experiments.harness.methods import adapt, lora_config
from experiments.harness.model_card import BaseModel
from experiments.harness.workdir import file_digest, read_run, write_json
from experiments.nlg import usage
from experiments.nlg.adapters import write_adapter
from experiments.nlg.base import load_base
from experiments.nlg.config import E2EConfig, FinetuneConfig
from experiments.nlg.finetuned import load_exported, weights_digests
from experiments.nlg.restore import load_run, trainable_shapes
from experiments.nlg.text_files import text_files, write_with
from experiments.nlg.tokens import with_token_ids
from lora_jax.interop import load_gguf_adapter, load_peft, load_peft_prompt, save_peft
from lora_jax.models.checkpoints.gguf import write_gguf
from lora_jax.models.gpt2.folder import load_gpt2, stored_tensors
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.llama import folder as llama_folder
from lora_jax.models.text.tokenizer import load_tokenizer
from lora_jax.models.zoo import load_causal_lm
from lora_jax.training.checkpoint import save_adapter
from lora_jax.training.fingerprint import fingerprint
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh

from tests.gguf_files import write_model
from tests.tiny_e2e import EMBEDDED, tiny_config, tiny_folder
from tests.toy_models import randomized, relative_difference

TOKENS = jnp.asarray([[5, 17, 300, 4000, 2, 9]])


SHORT = {"fit.num_train_steps": 4, "decoding.num_inputs": 0, "optimizer.learning_rate": 0.1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Short runs of LoRA, DoRA and full fine-tuning."""
  root = tmp_path_factory.mktemp("runs")
  for name, method in {"lora": "lora", "dora": "dora", "full": "full_finetuning"}.items():
    gpt2_e2e.run(apply(tiny_config(root / name), SHORT | {"method": method}))
  return root


def logits_of(run):
  return run.base.module.apply({"params": run.params}, TOKENS)


def check_text_files(folder):
  assert load_tokenizer(folder).get_vocab_size() == 8192
  assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 0}
  assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(("name", "flags"), [("lora", []), ("lora", ["--server"]), ("dora", [])])
def test_an_adapter_for_peft(runs, name, flags, tmp_path, capsys):
  check_adapter(runs / name, flags, tmp_path, capsys, rank=4)


METHODS = {  # of GPT-2's layers, with PEFT's method
  "hira": ("HIRA", {}),
  "ia3": ("IA3", {}),
  "ln_tuning": ("LN_TUNING", {}),
  "trainable_tokens": ("TRAINABLE_TOKENS", {"lora.tokens": ("<|endoftext|>", 17)}),
  "lora": ("LORA", {"lora.tokens": (17,), "lora.rank": 2}),
  **dict.fromkeys(("tiny_lora", "uni_lora", "lora_xs", "adalora", "dylora"), ("LORA", {})),
}


@pytest.mark.parametrize(
  "method", [m if m == "lora" else pytest.param(m, marks=pytest.mark.long) for m in METHODS]
)
def test_the_adapter_of_another_method_for_peft(method, tmp_path):
  kind, fields = METHODS[method]
  base, expected = untrained_run(tmp_path / "run", {"method": method, **fields})
  export.main([str(tmp_path / "run"), str(tmp_path / "new")])
  assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["peft_type"] == kind
  lora, trainable = load_peft(tmp_path / "new", base.model.stored, base.params)
  merged = lj.lora(base.model.call, lora).merge(base.params, trainable)
  assert relative_difference(merged, expected) < 1e-5
  assert relative_difference(base.params, expected) > 1e-3


def test_vectors_before_the_prompt_are_prompt_tuning_of_peft(tmp_path):
  """Without merging; a run with infix slots has no format."""
  changes = {"method": "prefix_embedding", "prefix.num_prefix": 3}
  settings = {
    name: read_config(
      E2EConfig, apply(tiny_config(tmp_path / name), changes | {"prefix.num_infix": number})
    )
    for name, number in (("run", 0), ("infix", 1))
  }
  base, vectors = load_base(settings["run"], make_mesh()), np.ones((3, 32), np.float32)
  for name, config in settings.items():
    save_adapter(tmp_path / name / "adapter", {"lora_added": {"prefix_embedding": vectors}})
    write_json(tmp_path / name / "config.json", dataclasses.asdict(config))
    write_json(tmp_path / name / "result.json", {"base": fingerprint(base.params)})
  export.main([str(tmp_path / "run"), str(tmp_path / "new")])
  trainable = load_peft_prompt(tmp_path / "new", base.model.stored, base.params)
  np.testing.assert_array_equal(trainable["lora_added"]["prefix_embedding"], vectors)
  card = (tmp_path / "new" / "README.md").read_text()
  assert "slots = lora_jax.Slots(3)" in card
  assert "| method | PreEmbed |" in card
  for name, flags, words in (
    ("run", ["--server"], "which only PEFT has, as prompt tuning: leave out --server"),
    ("run", ["--merged"], r"cannot be merged, and PEFT reads it without --merged"),
    ("infix", [], r"with prefix.num_infix=0 \(here 1\)"),
  ):
    with pytest.raises(SystemExit, match=words):
      export.main([str(tmp_path / name), str(tmp_path / "other"), *flags])


@pytest.mark.long
@pytest.mark.parametrize("method", [*METHODS, "rand_lora"])
def test_the_merged_model_of_another_method(method, tmp_path):
  fields = METHODS[method][1] if method in METHODS else {}
  _, expected = untrained_run(tmp_path / "run", {"method": method, **fields})
  export.main([str(tmp_path / "run"), str(tmp_path / "new"), "--merged"])
  assert relative_difference(load_gpt2(tmp_path / "new")[1], expected) < 1e-5


def test_an_adapter_that_no_package_reads_is_refused(tmp_path):
  settings = read_config(E2EConfig, apply(tiny_config(tmp_path), {"method": "bitfit"}))
  write_json(tmp_path / "config.json", dataclasses.asdict(settings))
  with pytest.raises(ValueError, match=r"a run of bitfit, which has no adapter that .* --merged"):
    export.export_adapter(tmp_path, tmp_path / "new")


def untrained_run(folder, changes):
  """Makes the folder of a finished run of a random adapter; returns its base and merged params."""
  settings = with_token_ids(read_config(E2EConfig, apply(tiny_config(folder), changes)))
  base = load_base(settings, make_mesh())
  loss = adapt(settings)(language_model_loss(base.module))
  shapes = trainable_shapes(loss, base.params)
  ids = {"token_ids": jnp.asarray(settings.lora.tokens, "float32")}
  draw = np.random.default_rng(5)

  def filled(path, leaf):
    """Returns an array in place of the shape of one that is not trained."""
    name = str(path[-1]).strip(".")
    if name in ids or not isinstance(leaf, jax.ShapeDtypeStruct):
      return ids.get(name, leaf)
    drawn = np.zeros(leaf.shape) if "index" in name else 0.3 * draw.standard_normal(leaf.shape)
    return jnp.asarray(drawn, leaf.dtype)

  trained = jax.tree_util.tree_map_with_path(filled, randomized(shapes))
  save_adapter(folder / "adapter", trained)
  write_json(folder / "config.json", dataclasses.asdict(settings))
  write_json(folder / "result.json", {"base": fingerprint(base.params), "valid_loss": 1.5})
  return base, loss.merge(base.params, trained)


@pytest.mark.long
def test_pissa_is_plain_lora_of_twice_the_rank(tmp_path, capsys):
  gpt2_e2e.run(apply(tiny_config(tmp_path / "run"), SHORT | {"method": "pissa"}))
  check_adapter(tmp_path / "run", [], tmp_path, capsys, rank=8)


def check_adapter(folder, flags, tmp_path, capsys, rank):
  export.main([str(folder), str(tmp_path / "new"), *flags])
  assert capsys.readouterr().out == f"wrote {tmp_path / 'new'}\n"
  config, params = load_gpt2(tiny_folder())
  lora_config, trainable = load_peft(tmp_path / "new", stored_tensors(config), params)
  adapted = lj.lora(lambda p, tokens: GPT2(config).apply({"params": p}, tokens), lora_config)
  expected = logits_of(load_run(folder))
  assert relative_difference(adapted.apply(params, trainable, TOKENS), expected) < 1e-5
  base = GPT2(config).apply({"params": params}, TOKENS)
  assert relative_difference(base, expected) > 1e-2
  check_text_files(tmp_path / "new")
  written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
  assert written["target_modules"] == ["c_attn", "c_proj", "c_fc"]
  assert ("rank_pattern" in written) == (not flags)  # 3 x 4 on the fused weight, 4 elsewhere
  assert written["r"] == (rank if not flags else 12)


@pytest.mark.parametrize("name", ["lora", "dora", "full"])
def test_a_merged_model_for_transformers(runs, name, tmp_path):
  export.main([str(runs / name), str(tmp_path / "new"), "--merged"])
  config, params = load_gpt2(tmp_path / "new")
  got = GPT2(config).apply({"params": params}, TOKENS)
  assert relative_difference(got, logits_of(load_run(runs / name))) < 1e-6
  check_text_files(tmp_path / "new")


def test_a_merged_model_has_the_base_models_dtype(runs, tmp_path, capsys):
  """The base model's folder is copied, and the error of rounding to bfloat16 is printed."""
  shutil.copytree(runs / "lora", tmp_path / "run")
  base = shutil.copytree(tiny_folder(), tmp_path / "base")
  narrow = {
    name: array.astype(ml_dtypes.bfloat16)
    for name, array in load_file(base / "model.safetensors").items()
  }
  save_file(narrow, base / "model.safetensors")
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  config["model"]["folder"] = str(base)
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  with pytest.raises(SystemExit, match="was trained on a base model with fingerprint"):
    export.main([str(tmp_path / "run"), str(tmp_path / "new"), "--merged"])
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  result["base"] = fingerprint(load_gpt2(base)[1])  # as if it had been
  (tmp_path / "run" / "result.json").write_text(json.dumps(result))
  export.main([str(tmp_path / "run"), str(tmp_path / "new"), "--merged"])
  printed = capsys.readouterr().out
  error = float(re.search(r"by at most\n(\S+) of their largest element \(h_", printed)[1])
  assert 1e-4 < error < 2**-8
  merged = load_file(tmp_path / "new" / "model.safetensors")
  assert {array.dtype for array in merged.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_what_cannot_be_exported(runs, tmp_path):
  with pytest.raises(SystemExit, match="is a run of full_finetuning, which has no adapter"):
    export.main([str(runs / "full"), str(tmp_path / "new")])
  with pytest.raises(SystemExit, match="read no DoRA"):
    export.main([str(runs / "dora"), str(tmp_path / "new"), "--server"])
  with pytest.raises(SystemExit, match="is not the folder of a run"):
    export.main([str(tmp_path), str(tmp_path / "new")])
  with pytest.raises(SystemExit, match="exists; nothing is overwritten"):
    export.main([str(runs / "lora"), str(tmp_path)])


def front_matter(card):
  yaml = pytest.importorskip("yaml")
  _, text, _ = card.split("---\n", 2)
  return yaml.safe_load(text)


def test_an_adapter_for_llama_cpp(runs, tmp_path, capsys):
  """With its card, and a Modelfile that stops where the run's texts stop."""
  export.main([str(runs / "lora"), str(tmp_path / "new" / "my.gguf")])
  assert capsys.readouterr().out == f"wrote {tmp_path / 'new' / 'my.gguf'}\n"
  names = ["my.Modelfile", "my.README.md", "my.gguf"]
  assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
  config, params = load_gpt2(tiny_folder())
  lora_config, trainable = load_gguf_adapter(tmp_path / "new" / "my.gguf", config, params)
  adapted = lj.lora(lambda p, tokens: GPT2(config).apply({"params": p}, tokens), lora_config)
  expected = logits_of(load_run(runs / "lora"))
  assert relative_difference(adapted.apply(params, trainable, TOKENS), expected) < 1e-5
  assert (tmp_path / "new" / "my.Modelfile").read_text().splitlines() == [
    f"# {tiny_folder()}, converted by llama.cpp's convert_hf_to_gguf.py",
    "FROM ./base.gguf",
    "ADAPTER ./my.gguf",
    "# trained on prompts without a chat template",
    'TEMPLATE """{{ .Prompt }}"""',
    'PARAMETER stop "<|endoftext|>"',
  ]
  card = (tmp_path / "new" / "my.README.md").read_text()
  assert front_matter(card)["library_name"] == "gguf"
  assert "llama-server -m base.gguf --lora my.gguf" in card
  assert '"cache_prompt": false' in card
  with pytest.raises(SystemExit, match=r"my\.gguf exists; nothing is overwritten"):
    export.main([str(runs / "lora"), str(tmp_path / "new" / "my.gguf")])
  (tmp_path / "my.Modelfile").touch()
  with pytest.raises(SystemExit, match=r"my\.Modelfile exists; nothing is overwritten"):
    export.main([str(runs / "lora"), str(tmp_path / "my.gguf")])


def test_an_adapter_for_mlx(runs, tmp_path):
  for name in ("lora", "dora"):
    export.main([str(runs / name), str(tmp_path / name), "--format=mlx"])
    config = json.loads((tmp_path / name / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == name
    assert "model.h.1.attn.c_attn.lora_a" in load_file(tmp_path / name / "adapters.safetensors")
    check_text_files(tmp_path / name)
    assert "mlx_lm.generate" in (tmp_path / name / "README.md").read_text()


def test_the_model_card(runs, tmp_path):
  """The base model and its licence, the data, the losses, the config, and how to use it."""
  export.main([str(runs / "lora"), str(tmp_path / "new"), "--server"])
  card = (tmp_path / "new" / "README.md").read_text()
  assert front_matter(card) == {
    "library_name": "peft",
    "pipeline_tag": "text-generation",
    "tags": ["lora", "lora_jax"],
  }
  result = json.loads((runs / "lora" / "result.json").read_text())
  digest = json.loads((runs / "lora" / "examples.json").read_text())
  for text in (
    f"| base model | `{tiny_folder()}` |",
    f"| its weights | fingerprint {result['base']} |",
    "| its licence | unknown: ",
    f"SHA-256 of its examples as tokens: {digest}",
    "LoRA, rank 4, alpha 32",
    "`.*/(attn/(query\\|key\\|value\\|out)",  # a bar would end the cell
    f", JAX {jax.__version__}",
    f"{result['valid_loss']:.4f} nats/token",
    "peft.PeftModel.from_pretrained(model, '.')",
    f"vllm serve {tiny_folder()} --enable-lora --max-lora-rank 16",
  ):
    assert text in card, text
  config = json.loads(card.split("```json\n")[1].split("```")[0])
  assert config == json.loads((runs / "lora" / "config.json").read_text())


def test_the_lines_that_load_a_quantized_base_model():
  """Nf4 weights are not those of the file: the adapter was trained on what these lines load."""
  for lines in (usage.in_lora_jax, usage.gguf_in_lora_jax):
    assert "load_causal_lm('base.gguf', param_dtype='nf4')" in lines("base.gguf", "a", "nf4")[1]
    assert "load_causal_lm('base.gguf')" in lines("base.gguf", "a", "auto")[1]


def test_a_card_has_no_path_of_the_users_cache(run_on_gguf, tmp_path):
  """A named model's file is somewhere else for others, who are told how to fetch it."""
  folder, model, _ = run_on_gguf
  run = load_exported(read_run(FinetuneConfig, folder))
  named = run._replace(base=run.base._replace(name="smollm2"))
  write_adapter(named, tmp_path / "my.gguf", "gguf")
  write_adapter(named, tmp_path / "folder", "peft")
  for card in (tmp_path / "my.README.md", tmp_path / "folder" / "README.md"):
    text = card.read_text()
    assert str(model.folder.parent) not in text.split("## Config")[0]
    assert "`base.gguf` is smollm2: `make smollm2` fetches it" in text
    assert f"base.gguf {file_digest(model.folder)}" in text
  assert "llama-server -m base.gguf --lora my.gguf" in (tmp_path / "my.README.md").read_text()
  assert "from_pretrained('.', gguf_file='base.gguf')" in text


def test_a_base_model_that_has_changed_is_not_exported_for(run_on_gguf, tmp_path):
  folder, _, _ = run_on_gguf
  run = shutil.copytree(folder, tmp_path / "run")
  result = json.loads((run / "result.json").read_text())
  result["weights"] = {"base.gguf": "0" * 64}
  (run / "result.json").write_text(json.dumps(result))
  with pytest.raises(SystemExit, match=r"trained on other weights than are in .*base\.gguf"):
    export.main([str(run), str(tmp_path / "my.gguf")])


def test_a_base_model_for_the_card(tmp_path):
  """Repositories are named as on the hub; the licence is that of the files, or unknown."""
  assert BaseModel("smollm2", tmp_path, {}).repository == "HuggingFaceTB/SmolLM2-135M-Instruct"
  assert BaseModel("user/model", tmp_path, {}).repository == "user/model"
  assert BaseModel(str(tmp_path), tmp_path, {}).repository is None
  assert BaseModel("", EMBEDDED, {}).license == "cc-by-sa-4.0"
  assert BaseModel("", tmp_path, {}).license == "unknown"
  (tmp_path / "LICENSE").write_text("Our own terms")
  assert BaseModel("", tmp_path, {}).license == "see LICENSE"
  (tmp_path / "LICENSE").write_text("  Apache License\n   Version 2.0, January 2004")
  assert BaseModel("", tmp_path, {}).license == "apache-2.0"
  metadata = {"general.license": "apache-2.0"}
  write_gguf(tmp_path / "x.gguf", "llama", metadata, {"a": np.zeros((1, 32), np.float32)})
  assert BaseModel("", tmp_path / "x.gguf", {}).license == "apache-2.0"


def test_nothing_is_left_of_an_adapter_that_cannot_be_written(runs, tmp_path, monkeypatch):
  """Three files are moved to their places; if one fails, none is there."""
  rename = os.rename

  def fail(source, target):
    if str(target).endswith("my.README.md"):
      raise OSError(28, "No space left on device", str(target))
    rename(source, target)

  monkeypatch.setattr(os, "rename", fail)
  with pytest.raises(SystemExit, match="No space left on device"):
    export.main([str(runs / "lora"), str(tmp_path / "my.gguf")])
  assert list(tmp_path.iterdir()) == []


def test_formats_that_do_not_fit(runs, tmp_path):
  for name, out, flags, words in (
    ("dora", "my.gguf", [], "plain LoRA, and h_0/attn/key/kernel is adapted by DoRA"),
    ("lora", "new", ["--format=gguf"], r"writes a file named \*\.gguf, got"),
    ("lora", "my.gguf", ["--format=mlx"], "writes a folder, got"),
    ("lora", "new", ["--format=mlx", "--server"], "--format=mlx too"),
    ("lora", "new", ["--format=peft-experts"], "has no experts"),
    ("full", "my.gguf", [], "full_finetuning, which has no adapter"),
  ):
    with pytest.raises(SystemExit, match=words):
      export.main([str(runs / name), str(tmp_path / out), *flags])
  assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run_on_gguf(tmp_path_factory):
  """The folder of a finished run of `finetune` whose base model is a GGUF file, without a training.

  Its adapter is random, and is of a mixture's experts and queries.
  """
  root = tmp_path_factory.mktemp("gguf")
  model = load_causal_lm(write_model(root / "base.gguf", "mixtral"))
  config = get_config()
  config.workdir, config.model.folder = str(root / "run"), str(root / "base.gguf")
  config.lora.target, config.lora.rank = r".*(/attn/query/kernel|/experts/\w+)", 2
  settings = read_config(FinetuneConfig, config)
  lora = lora_config(settings)
  adapted = lj.lora(model.call, lora)
  shapes = jax.eval_shape(adapted.init, jax.random.key(0), model.params, TOKENS[:, :3] % 64)
  draw = np.random.default_rng(0)
  trainable = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype("float32"), shapes)
  save_adapter(root / "run" / "adapter", trainable)
  files = text_files(tiny_folder(), load_tokenizer(tiny_folder()), [0])
  write_with(
    files,
    root / "run" / "peft",
    lambda path: save_peft(path, lora, trainable, model.stored, model.params),
  )
  (root / "run" / "config.json").write_text(json.dumps(config.to_dict()))
  result = {"weights": weights_digests(model.folder), "valid_loss": 1.5, "chats": True}
  (root / "run" / "result.json").write_text(json.dumps(result))
  return root / "run", model, trainable


def test_a_run_on_a_gguf_file_for_llama_cpp(run_on_gguf, tmp_path):
  """The card names the base model's file and its digest; Ollama takes its chat template."""
  folder, model, trainable = run_on_gguf
  export.main([str(folder), str(tmp_path / "my.gguf")])
  _, loaded = load_gguf_adapter(tmp_path / "my.gguf", model.module.config, model.params)
  jax.tree.map(np.testing.assert_array_equal, loaded, trainable)
  assert (tmp_path / "my.Modelfile").read_text().splitlines() == [
    f"FROM {model.folder.resolve()}",
    "ADAPTER ./my.gguf",
    'PARAMETER stop "<|endoftext|>"',
  ]
  card = (tmp_path / "my.README.md").read_text()
  assert f"base.gguf {file_digest(model.folder)}" in card
  assert f"llama-server -m {model.folder} --lora my.gguf" in card
  assert "1.5000 nats/token" in card


def test_a_run_on_a_gguf_file_with_each_experts_factors(run_on_gguf, tmp_path):
  folder, model, _ = run_on_gguf
  export.main([str(folder), str(tmp_path / "new"), "--format=peft-experts"])
  arrays = load_file(tmp_path / "new" / "adapter_model.safetensors")
  name = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w1.lora_A.weight"
  assert arrays[name].shape == (2, 16)
  tensors = llama_folder.stored_tensors(model.module.config, published=True)
  load_peft(tmp_path / "new", tensors, model.params)


def test_a_run_on_a_gguf_file_merged(run_on_gguf, tmp_path):
  """Its blocks cannot hold a merged weight, so the new folder is in float32."""
  folder, model, trainable = run_on_gguf
  export.main([str(folder), str(tmp_path / "new"), "--merged"])
  merged = load_causal_lm(tmp_path / "new")
  before, after, adapter = (
    tree["layers_1"]["mlp"]["experts"]["up"] for tree in (model.params, merged.params, trainable)
  )
  scaling = get_config().lora.alpha / 2
  np.testing.assert_allclose(after, before + scaling * adapter.lora_a @ adapter.lora_b, rtol=1e-5)
  check_text_files(tmp_path / "new")


def quantized_run(run_on_gguf, folder, method):
  """Copies a run, as if it had been trained on int8 weights."""
  shutil.copytree(run_on_gguf[0], folder)
  config = json.loads((folder / "config.json").read_text())
  config["method"], config["model"]["param_dtype"] = method, "int8"
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def test_a_run_on_quantized_weights_is_merged_into_them(run_on_gguf, tmp_path, capsys):
  """Not into the file's, with which the adapter is another model."""
  run = quantized_run(run_on_gguf, tmp_path / "run", "loftq")
  export.main([str(run), str(tmp_path / "new"), "--merged"])
  assert "into the int8 weights of its training, dequantized to float32" in capsys.readouterr().out
  _, file, trainable = run_on_gguf
  lora = lora_config(read_run(FinetuneConfig, run))
  base = load_causal_lm(file.folder, param_dtype="int8")
  expected = lj.lora(base.call, lora).merge(lj.dequantize(base.params), trainable)
  merged = load_causal_lm(tmp_path / "new").params
  assert relative_difference(merged, expected) < 1e-6
  in_file = lj.lora(file.call, lora).merge(file.params, trainable)
  assert relative_difference(merged, in_file) > 2e-5


def test_a_run_on_quantized_weights_says_so(run_on_gguf, tmp_path):
  """LoftQ's adapter, which is another model on the file's weights, is not exported for them."""
  export.main([str(quantized_run(run_on_gguf, tmp_path / "run", "lora")), str(tmp_path / "a.gguf")])
  for path in (tmp_path / "a.README.md", tmp_path / "a.Modelfile"):
    assert "Trained on weights quantized to int8: with the files' own, its" in path.read_text()
  run = quantized_run(run_on_gguf, tmp_path / "loftq", "loftq")
  for flags in (["b.gguf"], ["b", "--format=mlx"], ["b"]):
    with pytest.raises(SystemExit, match=r"another model\. Export it --merged, as float32 weights"):
      export.main([str(run), str(tmp_path / flags[0]), *flags[1:]])
  write_adapter(load_exported(read_run(FinetuneConfig, run)), tmp_path / "peft", "peft")  # a run's
  card = (tmp_path / "peft" / "README.md").read_text()
  lines = "\n".join(finetune.how_to_load(read_run(FinetuneConfig, run)))
  for text in (card, lines):
    assert "param_dtype='int8'" in text
    assert "PeftModel" not in text
  assert f"experiments.export {run} FOLDER --merged" in lines
  with pytest.raises(SystemExit, match="adapts int8 weights, and a merged GGUF file has those of"):
    export.main([str(run), str(tmp_path / "c.gguf"), "--merged"])


def test_rounded_weights_are_what_an_e2e_run_is_merged_into(tmp_path):
  _, expected = untrained_run(tmp_path / "run", {"model.rounded_to": "Q4_0"})
  export.main([str(tmp_path / "run"), str(tmp_path / "new"), "--merged"])
  assert relative_difference(load_gpt2(tmp_path / "new")[1], expected) < 1e-6
  export.main([str(tmp_path / "run"), str(tmp_path / "adapter")])
  assert "quantized to Q4_0: with the files'" in (tmp_path / "adapter" / "README.md").read_text()
