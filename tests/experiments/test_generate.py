"""Text from finished runs of each experiment and method, by the weights that they trained."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import generate
from experiments.configs import finetune as finetune_configs
from experiments.configs import glue as glue_configs
from experiments.harness.config import read_config
from experiments.harness.fit import initialize
from experiments.harness.launch import apply
from experiments.harness.methods import adapt
from experiments.nlg import finetuned
from experiments.nlg.base import load_base
from experiments.nlg.config import E2EConfig, FinetuneConfig
from experiments.nlg.generation import Sampling, load_generator
from lora_jax.data.batches import fill
from lora_jax.models.gpt2.folder import save_gpt2
from lora_jax.models.zoo import load_causal_lm
from lora_jax.training.checkpoint import save_adapter
from lora_jax.training.loss import language_model_loss
from lora_jax.training.mesh import make_mesh

from tests.tiny_e2e import EMBEDDED, chat_folder, tiny_config

PROMPTS = ["name : Aromi", "name : The Vaults | Type : pub"]
TEMPLATE = (
  "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant: {% endif %}"
)
GREEDY = Sampling(max_new_tokens=4)


def noisy(tree, scale=0.3):
  """Returns a tree with noise in each leaf, in the place of training."""
  draw = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x + jnp.asarray(scale * draw.standard_normal(x.shape), x.dtype), tree
  )


def finished(config, folder):
  """Writes a finished run's files, except the trained weights."""
  folder.mkdir()
  stored = config.to_dict()
  del stored["workdir"]
  (folder / "config.json").write_text(json.dumps(stored))
  result = {"valid_loss": 1.0, "best_step": 1, "num_train_steps": 1, "method": stored["method"]}
  (folder / "result.json").write_text(json.dumps(result))
  return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
  """A GPT-2 with a chat template."""
  return chat_folder(tmp_path_factory.mktemp("model"), TEMPLATE)


def finetuned_run(model_folder, folder, method):
  """Returns a finished run, its base model and its adapter."""
  changes = {"model.folder": str(model_folder), "data.file": "mine.jsonl", "lora.rank": 2}
  source = apply(finetune_configs.get_config(), changes | {"method": method})
  finished(source, folder)
  config, model = read_config(FinetuneConfig, source), load_causal_lm(model_folder)
  loss = finetuned.adapted_loss(config, model)
  trained = noisy(initialize(config, loss, model.params, fill([], 1, 2, 2)))
  save_adapter(folder / "adapter", trained)
  return config, model, trained


def likeliest(apply, prompt, count=4, length=64):
  """Returns the likeliest tokens after a prompt, by the whole sequence at each step."""
  ids = list(prompt)
  for _ in range(count):
    padded = jnp.asarray([ids + [0] * (length - len(ids))])  # later tokens change nothing
    ids.append(int(jnp.argmax(apply(padded)[0, len(ids) - 1])))
  return ids[len(prompt) :]


@pytest.mark.parametrize(
  ("method", "chat"), [("lora", True), pytest.param("dora", False, marks=pytest.mark.long)]
)
def test_an_adapters_answers_are_its_likeliest_tokens(method, chat, model_folder, tmp_path):
  config, model, trained = finetuned_run(model_folder, tmp_path / "run", method)
  generator = load_generator(tmp_path / "run", chat=chat)
  answers = generator.answer(PROMPTS, GREEDY)
  merged = finetuned.adapted_loss(config, model).merge(model.params, trained)
  tokens = generator.encode(PROMPTS)
  text = "".join(generator.tokenizer.decode(ids) for ids in tokens)
  assert ("assistant: " in text) == chat
  apply = jax.jit(partial(model.call, merged))
  for prompt, answer in zip(tokens, answers, strict=True):
    ids = likeliest(apply, prompt)
    stops = [i for i, token in enumerate(ids) if token in generator.end_ids]
    assert answer == generator.tokenizer.decode(ids[: min(stops, default=4)]).strip()


def test_a_file_of_prompts_for_several_runs(model_folder, tmp_path, capsys):
  folders = [tmp_path / name for name in ("first", "second")]
  finetuned_run(model_folder, folders[0], "lora")
  *_, trained = finetuned_run(model_folder, folders[1], "lora")
  shutil.rmtree(folders[1] / "adapter")
  save_adapter(folders[1] / "adapter", noisy(trained))  # the runs have the same seed
  lines = [(folders[1], PROMPTS[0]), (folders[0], PROMPTS[0]), (folders[1], PROMPTS[1])]
  file = tmp_path / "prompts.jsonl"
  file.write_text("".join(json.dumps({"run": str(r), "prompt": p}) + "\n" for r, p in lines))
  generate.main([f"--file={file}", "--max_new_tokens=4"])
  answers = capsys.readouterr().out.split("> ")[1:]
  alone = load_generator(folders[1]).answer(PROMPTS, GREEDY)
  assert [answers[0], answers[2]] == [
    f"{p}\n{text}\n\n" for p, text in zip(PROMPTS, alone, strict=True)
  ]
  assert answers[1] != answers[0]
  changes = {"model.folder": str(model_folder), "model.param_dtype": "bfloat16"}
  changes |= {"data.file": "mine.jsonl", "method": "lora"}
  source = apply(finetune_configs.get_config(), changes)
  other = finished(source, tmp_path / "other")
  file.write_text(file.read_text() + json.dumps({"run": str(other), "prompt": "Hi"}))
  with pytest.raises(SystemExit, match="expected runs with one base model"):
    generate.main([f"--file={file}"])
  dated = finished(apply(source, {"data.today": "2020-02-03"}), tmp_path / "dated")
  runs = [{"run": str(folder), "prompt": "Hi"} for folder in (other, dated)]
  file.write_text("\n".join(map(json.dumps, runs)))
  with pytest.raises(SystemExit, match=r"data\.today=2020-02-03, and .*; generate separately"):
    generate.main([f"--file={file}", "--chat"])
  for arguments in ([f"--file={file}", str(other)], [], [str(other)]):
    with pytest.raises(SystemExit, match="the folder of a run and prompts, or --file"):
      generate.main(arguments)
  file.write_text('{"prompt": "Hi"}')
  with pytest.raises(SystemExit, match=r"prompts\.jsonl:1: expected"):
    generate.main([f"--file={file}"])


def test_a_run_of_gpt2_e2e(tmp_path, capsys):
  source = tiny_config(tmp_path / "run")
  finished(source, tmp_path / "run")
  config = read_config(E2EConfig, source)
  base = load_base(config, make_mesh())
  adaptation = adapt(config)(language_model_loss(base.module))
  trained = noisy(initialize(config, adaptation, base.params, fill([], 1, 2, 2)))
  save_adapter(tmp_path / "run" / "adapter", trained)
  merged = adaptation.merge(base.params, trained)
  generate.main([str(tmp_path / "run"), PROMPTS[0], "--max_new_tokens=4"])
  prompt = [*base.tokenizer.encode(PROMPTS[0], add_special_tokens=False).ids, base.end_of_text]
  ids = likeliest(jax.jit(partial(base.module.apply, {"params": merged})), prompt)
  stop = ids.index(base.end_of_text) if base.end_of_text in ids else 4
  assert capsys.readouterr().out == base.tokenizer.decode(ids[:stop]).strip() + "\n"
  with pytest.raises(SystemExit, match="has no chat template; leave out --chat"):
    generate.main([str(tmp_path / "run"), "Hi", "--chat"])


def test_fully_trained_and_pretrained_models(model_folder, tmp_path, capsys):
  model = load_causal_lm(model_folder)
  changes = {"model.folder": str(model_folder), "data.file": "mine.jsonl"}
  source = apply(finetune_configs.get_config(), changes | {"method": "full_finetuning"})
  run, params = finished(source, tmp_path / "run"), noisy(model.params)
  model.save(run / "model", params, tokenizer_from=model_folder, end_of_text_id=0)
  arguments = ["--max_new_tokens=4", "--temperature=0.8", "--top_p=0.9", "--seed=1"]
  generate.main([str(run), *PROMPTS, *arguments])
  first = capsys.readouterr().out
  assert first.startswith(f"> {PROMPTS[0]}\n")
  assert f"\n> {PROMPTS[1]}\n" in first
  generate.main([str(run), *PROMPTS, *arguments])
  assert capsys.readouterr().out == first
  pretrained = finished(apply(source, {"experiment": "gpt2_pretrain"}), tmp_path / "pretrained")
  save_gpt2(pretrained / "base", model.module.config, params, EMBEDDED, 0)
  sampling = Sampling(4, 0.8, 0.9, seed=1)
  generator = load_generator(pretrained)
  for prompt, answer in zip(PROMPTS, generator.answer(PROMPTS, sampling), strict=True):
    assert f"> {prompt}\n{answer}\n" in first


def test_a_classifier_is_refused(tmp_path):
  run = finished(glue_configs.get_config(), tmp_path / "run")
  message = "is a run of glue, which generates no text; expected a run of gpt2_e2e, finetune"
  with pytest.raises(SystemExit, match=message):
    generate.main([str(run), "Hi"])


def test_an_empty_answer_is_explained(monkeypatch, capsys):
  silent = type("Silent", (), {"answer": lambda self, prompts, sampling: ["" for _ in prompts]})
  monkeypatch.setattr(generate, "load_generator", lambda folder, chat: silent())
  generate.main(["run", "Hi"])
  assert "a model trained on messages answers them with --chat" in capsys.readouterr().err.lower()
  generate.main(["run", "--chat", "Hi"])
  assert "generated its end token first\n" in capsys.readouterr().err
