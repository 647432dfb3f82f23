"""Pretrains a small GPT-2 from scratch on plain text, to adapt it later.

    python -m experiments.gpt2_pretrain --config.data.folder=FOLDER_OF_TEXT
    python -m experiments.gpt2_pretrain --config.data.folder=FOLDER_OF_TEXT --sweep  # budgets

The default is 20 M tokens, hours on 2 CPU cores. Rerun the command to resume an interrupted run.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.harness.config import read_config
from experiments.nlg.config import PretrainConfig


def get_config() -> Config:
  """Returns the config of a model of 6.9 M parameters."""
  config: Config = ConfigDict()
  config.experiment = "gpt2_pretrain"
  config.variant = "base"
  config.workdir = ""  # "" is runs/gpt2_pretrain/<what differs from this file>
  config.keep_freed_memory = True  # on CPUs: faster, and more memory
  config.seed = 0  # of the weights and the order of the rows

  config.data = ConfigDict()
  config.data.folder = ""  # text files: *.txt, *.txt.xz or *.txt.gz
  config.data.prepared = "runs/gpt2_pretrain"  # the folder of tokenizers and tokens, for all runs
  config.data.vocab_size = 8192  # of the byte-level BPE that is trained on the text
  config.data.held_out_every = 200  # holds out one document in 200
  config.data.num_valid_rows = 256  # held-out rows evaluated during training; all at the end
  config.data.num_train_tokens = 20_000_000
  config.data.batch_size = 32  # rows
  config.data.row_length = 256  # tokens

  config.model = ConfigDict()
  config.model.embed_dim = 256
  config.model.num_layers = 6
  config.model.num_heads = 4
  config.model.num_positions = 256
  config.model.dtype = "auto"  # of the computation; auto is bfloat16, or float32 on CPUs
  config.model.scan_layers = False
  config.model.attention = "compact"  # or xla, or cudnn (on a GPU, with bfloat16)

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 2e-3
  config.optimizer.weight_decay = 0.1
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.eps = 1e-8
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 100
  config.optimizer.clip_norm = 1.0

  config.fit = ConfigDict()
  config.fit.eval_every_steps = 250
  config.fit.checkpoint_every_steps = 50
  config.fit.checkpoint_every_seconds = 300.0  # at a line of the log; 0 saves by steps only
  config.fit.log_every_steps = 10
  config.fit.accumulation_steps = 4  # parts of a batch; on CPUs less memory is faster
  config.fit.loss_chunk = 0

  config.mesh = ConfigDict()
  config.mesh.data = 1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.distributed = ConfigDict()  # several processes that do one run together: docs/scale.md
  config.distributed.coordinator_address = ""  # HOST:PORT of process 0; auto is what JAX detects
  config.distributed.num_processes = 0  # 0 is what JAX detects
  config.distributed.process_id = -1  # of this process; -1 is what JAX detects
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the budgets: 1 %, 10 % and 100 % of the config's, each with its own schedule."""
  read_config(PretrainConfig, config)
  for part in (100, 10, 1):
    yield {
      "data.num_train_tokens": config.data.num_train_tokens // part,
      "optimizer.warmup_steps": config.optimizer.warmup_steps // part,
    }
