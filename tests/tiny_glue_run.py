"""A run of the GLUE experiment in seconds: made-up examples, a tiny BERT, random weights."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.configs import glue as configs
from lora_jax.models.bert.folder import save_bert
from lora_jax.models.bert.model import Bert, BertConfig
from lora_jax.models.deberta.folder import save_deberta
from lora_jax.models.deberta.model import Deberta, DebertaConfig

from tests.tiny_glue import WORDS, write_glue, write_superglue
from tests.tiny_tokenizer import tiny_tokenizer

TEXTS = [*WORDS, 'The man. It is , a " b c']


@functools.cache
def tiny_folder(kind: str = "bert") -> Path:
  """Returns a Hugging Face folder of a random encoder, one layer x 32, without a head.

  Args:
    kind: bert, roberta or deberta.
  """
  tokenizer = tiny_tokenizer(TEXTS)
  shape = {
    "vocab_size": tokenizer.get_vocab_size(),
    "num_positions": 64,
    "embed_dim": 32,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 64,
  }
  if kind == "deberta":
    model, save = Deberta(DebertaConfig(**shape, num_buckets=8, max_distance=64)), save_deberta
  else:
    options = {"num_token_types": 1, "pad_id": 0} if kind == "roberta" else {}
    model, save = Bert(BertConfig(**shape, kind=kind, **options)), save_bert
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  folder = Path(tempfile.mkdtemp(prefix=f"tiny-{kind}-")) / "model"
  save(folder, model.config, params)
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder


@functools.cache
def tiny_source() -> Path:
  """Returns a folder with the files of GLUE, and in `super` those of SuperGLUE."""
  folder = write_glue(Path(tempfile.mkdtemp(prefix="tiny-glue-")))
  write_superglue(folder / "super")
  return folder


def tiny_config(workdir: str | Path, task: str = "cola"):
  """Returns a config of `experiments.glue`: 40 examples or fewer, 2 epochs, rows of 16 tokens."""
  config = configs.get_config(f"minilm,{task}")
  config.workdir = str(workdir)
  config.model.folder = str(tiny_folder())
  config.lora.rank = 2
  source = tiny_source()
  config.data.source = str(source if config.data.suite == "glue" else source / "super")
  config.data.tfds_dir = str(source / "tfds")
  config.data.update({"any_size": True, "batch_size": 8, "eval_batch_size": 8})
  config.data.row_lengths = (16,)
  config.data.num_train_records = 0
  config.fit.update({"num_epochs": 2, "log_every_steps": 1})
  return config
