"""Pretraining from end to end, on real sentences and a tiny model."""

import json
import math
import shutil

import numpy as np
import pytest

from experiments import gpt2_e2e, gpt2_pretrain
from experiments.configs import gpt2_pretrain as configs
from experiments.harness.config import read_config
from experiments.harness.launch import apply
from experiments.nlg.config import PretrainConfig
from experiments.nlg.pretraining import flops_per_token, pretrained_config
from lora_jax.data import corpus
from lora_jax.data.sets import e2e
from lora_jax.models.gpt2.folder import load_gpt2
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.text.tokenizer import end_of_text_id, load_tokenizer
from lora_jax.training.loss import language_model_loss

from tests.tiny_e2e import tiny_config
from tests.tiny_training import interrupted_at


def pretraining(folder, workdir):
  config = configs.get_config()
  config.workdir = str(workdir)
  config.data.folder = str(folder)
  config.data.prepared = str(workdir.parent)
  config.data.update({"vocab_size": 512, "held_out_every": 20, "num_train_tokens": 16_384})
  config.data.update({"batch_size": 8, "row_length": 128, "num_valid_rows": 8})
  config.model.update({"embed_dim": 32, "num_layers": 2, "num_heads": 2})
  config.optimizer.update({"warmup_steps": 4, "learning_rate": 2e-2})
  config.fit.update({"eval_every_steps": 8, "accumulation_steps": 2})
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  root = tmp_path_factory.mktemp("pretrain")
  (root / "text").mkdir()
  lines = [record.completion for record in e2e.read("train")[:4000]]
  documents = ["\n".join(lines[i : i + 10]) for i in range(0, 4000, 10)]
  (root / "text" / "a.txt").write_text("\n<|endoftext|>\n".join(documents), "utf-8")
  config = pretraining(root / "text", root / "runs" / "one")
  return root, config, gpt2_pretrain.run(config)


def test_the_model_learns_and_its_figures_are_those_of_the_shipped_weights(finished):
  root, config, result = finished
  assert result["train_tokens"] == 16_384
  assert result["num_train_steps"] == 16
  assert result["held_out_loss"] < math.log(512) - 1
  assert result["held_out_loss"] == pytest.approx(result["held_out_loss_float32"], abs=0.02)
  folder = root / "runs" / "one" / "base"
  tokenizer = load_tokenizer(folder, 512)
  model, params = load_gpt2(folder)
  assert end_of_text_id(tokenizer) == 0
  train, held_out = corpus.split(corpus.documents(corpus.find_files(config.data.folder)), 20)
  stream = corpus.encode_stream(tokenizer, held_out, 0)
  rows = corpus.Rows(stream, 0, batch_size=8, row_length=128, seed=None)
  parts = [language_model_loss(GPT2(model))(params, rows[i]) for i in range(len(rows))]
  loss = sum(float(part.total) for part in parts) / sum(float(part.weight) for part in parts)
  assert result["held_out_loss"] == pytest.approx(loss, rel=1e-5)
  size = sum(len(text.encode()) for text in held_out)
  assert result["bits_per_byte"] == pytest.approx(loss * (len(stream) - 1) / size / math.log(2))
  (text,) = (root / "runs").glob("text-*")
  stored = tokenizer.decode(np.load(text / "train.npy").tolist(), skip_special_tokens=False)
  assert stored == "<|endoftext|>".join(["", *train, ""])


def test_the_card_says_what_was_done(finished):
  root, _, result = finished
  card = (root / "runs" / "one" / "base" / "README.md").read_text()
  assert f"perplexity {math.exp(result['held_out_loss']):.1f}" in card
  assert f"{result['bits_per_byte']:.3f} bits per byte" in card
  assert "--config.data.num_train_tokens=16384" in card
  assert str(root) not in card
  assert json.loads((root / "runs" / "one" / "result.json").read_text()) == result


def test_it_can_be_adapted(finished, tmp_path):
  root, _, _ = finished
  config = tiny_config(tmp_path / "run")
  config.model.folder = str(root / "runs" / "one" / "base")
  config.data.update({"row_length": 256, "num_train_records": 16, "loss_length": 256})
  config.decoding.num_inputs = 0
  result = gpt2_e2e.run(config)
  assert result["num_train_records"] == 16
  assert result["pretraining_tokens"] == finished[2]["train_tokens"]


def test_prepared_text_is_made_once(finished, capsys):
  root, config, result = finished
  (folder,) = (root / "runs").glob("text-*")
  before = (folder / "train.npy").stat().st_mtime_ns
  other = apply(config, {"seed": 1, "data.num_train_tokens": 1024, "optimizer.warmup_steps": 1})
  other.workdir = str(root / "runs" / "two")
  assert gpt2_pretrain.run(other)["num_train_steps"] == 1
  assert (folder / "train.npy").stat().st_mtime_ns == before
  assert "making a vocabulary" not in capsys.readouterr().out
  assert gpt2_pretrain.run(config) == result


@pytest.mark.long
def test_an_interrupted_run_resumes_to_the_same_bits(finished):
  root, config, result = finished
  config = apply(config, {"fit.checkpoint_every_steps": 5})
  config.workdir = str(root / "runs" / "broken")
  with interrupted_at(10):
    gpt2_pretrain.run(config)
  resumed = gpt2_pretrain.run(config)
  assert resumed["held_out_loss"] == result["held_out_loss"]
  weights = [root / "runs" / name / "base" / "model.safetensors" for name in ("one", "broken")]
  assert weights[0].read_bytes() == weights[1].read_bytes()


def test_text_that_changes_during_a_run_is_refused(finished, tmp_path):
  root, config, _ = finished
  folder = tmp_path / "text"
  shutil.copytree(config.data.folder, folder)
  config = apply(
    config,
    {
      "data.folder": str(folder),
      "data.num_train_tokens": 1024,
      "optimizer.warmup_steps": 1,
    },
  )
  config.workdir = str(tmp_path / "run")
  gpt2_pretrain.run(config)
  (tmp_path / "run" / "result.json").unlink()
  with (folder / "a.txt").open("r+") as file:
    file.write("X")  # the size is the same
  with pytest.raises(ValueError, match=r"was started with other text .* it has changed since"):
    gpt2_pretrain.run(config)
  assert len(list((root / "runs").glob("text-*"))) == 2


def test_text_must_be_given_and_be_enough(tmp_path):
  config = configs.get_config()
  with pytest.raises(ValueError, match=r"add --config\.data\.folder"):
    gpt2_pretrain.run(config)
  with pytest.raises(
    ValueError, match=r"row_length=512 must be at most model\.num_positions = 256"
  ):
    gpt2_pretrain.run(apply(config, {"data.row_length": 512}))
  with pytest.raises(ValueError, match=r"config of 'glue'.* the experiment is 'gpt2_pretrain'"):
    gpt2_pretrain.run(apply(config, {"experiment": "glue"}))
  config = pretraining(tmp_path / "empty", tmp_path / "run")
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="expected text files"):
    gpt2_pretrain.run(config)


def test_operations_are_those_of_the_matmuls():
  """Per token 2 for each weight in a matmul, 4 T D for each layer's attention; backward twice."""
  config = configs.get_config()
  model = pretrained_config(read_config(PretrainConfig, config))
  dense = 6 * (4 * 256**2 + 2 * 256 * 1024) + 8192 * 256
  assert flops_per_token(model, 128) == 6 * (dense + 6 * 2 * 128 * 256)
  assert [run["data.num_train_tokens"] for run in configs.sweep(config)] == [
    200_000,
    2_000_000,
    20_000_000,
  ]
  assert np.dtype(model.dtype) == np.float32
