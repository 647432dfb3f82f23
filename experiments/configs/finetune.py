"""A model of your own, with data of your own.

    python -m experiments.finetune --model=FOLDER_OR_REPOSITORY --data=mine.jsonl --dry_run
    python -m experiments.finetune --model=FOLDER_OR_REPOSITORY --data=mine.jsonl

Lines of the data: {"prompt": ..., "completion": ...}, or {"messages": [{"role": ..., "content":
...}, ...]}, for which the model's folder needs a chat template.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.harness.config import ALL_LINEAR, read_config
from experiments.harness.methods import multiples
from experiments.nlg.config import FinetuneConfig


def get_config() -> Config:
  """Returns the config; `--model` is `model.folder`, and `--data` is `data.file`."""
  config: Config = ConfigDict()
  config.experiment = "finetune"
  config.variant = "finetune"
  config.workdir = ""  # "" is runs/finetune/<what differs from this file>
  config.seed = 0  # of the adapter, the order of the data and dropout
  config.keep_freed_memory = False  # on CPUs: faster, and more memory
  config.method = "lora"  # or full_finetuning, at a tenth of the learning rate; harness/methods.py

  config.model = ConfigDict()
  config.model.folder = ""  # a Hugging Face folder, or a repository of the hub
  config.model.dtype = "auto"  # of the computation: bfloat16, on CPUs float32
  config.model.param_dtype = "auto"  # of the frozen weights: likewise
  config.model.scan_layers = False  # compiles deep models faster
  config.model.remat = ""  # or a policy, as nothing_saveable: less memory, more time
  config.model.attention = "compact"  # or cudnn, on a GPU with bfloat16; or xla

  config.lora = ConfigDict()
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.lora.dropout = 0.0
  config.lora.target = ALL_LINEAR  # a pattern of paths; all-linear stands for this one
  config.lora.init = "kaiming_uniform"

  config.data = ConfigDict()
  config.data.file = ""  # JSON lines
  config.data.valid_file = ""  # likewise; "" holds out a part of data.file
  config.data.valid_share = 0.05  # of data.file that is held out, one line at least
  config.data.chat_template = ""  # a file with a template in Jinja; "" is that of the model
  config.data.today = "2024-07-26"  # for templates that write the date; the same whenever it runs
  config.data.ignored_fields = ()  # of a line, besides those of its form, as ("id",)
  config.data.row_length = 0  # tokens; 0 is the longest example's, up to a multiple of 64
  config.data.truncate = False  # cuts longer lines; otherwise they are an error
  config.data.packing = True  # several examples a row, each seeing only itself
  config.data.batch_size = 8  # rows
  config.data.num_epochs = 3

  # LoRA wants a higher rate than full fine-tuning of the same model: about ten times (Schulman et
  # al. 2025, "LoRA Without Regret"); three times on our small base (docs/gpt2_e2e.md: 1e-2 and
  # 3e-3). 2e-4 is the rate of Hu et al. 2021 for GPT-2 and GPT-3, and of Dettmers et al. 2023
  # (QLoRA) for 7 B and 13 B parameters; they take 1e-4 for 33 B and 65 B. If the loss falls
  # slowly, try three times as much; if it jumps, a third. `--sweep` tries four.
  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 2e-4
  config.optimizer.weight_decay = 0.0
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.eps = 1e-8
  config.optimizer.schedule = "linear"  # after the warmup down to 0; or cosine, or constant
  config.optimizer.warmup_steps = 10  # at most a tenth of all
  config.optimizer.clip_norm = 1.0  # of the gradient; 0 is no clipping

  config.fit = ConfigDict()
  config.fit.eval_every_steps = 100
  config.fit.checkpoint_every_steps = 50
  config.fit.checkpoint_every_seconds = 300.0  # at a line of the log; 0 saves by steps only
  config.fit.log_every_steps = 10
  config.fit.accumulation_steps = 1  # parts of a batch that are processed one after another
  config.fit.loss_chunk = 0  # target tokens of a row whose logits are in memory at once; 0 is all
  config.fit.keep = "best"  # the checkpoint that is exported: best by validation loss, or last

  config.mesh = ConfigDict()
  config.mesh.data = 1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.samples = ConfigDict()
  config.samples.count = 3  # held-out lines that are answered at the end, greedily
  config.samples.max_new_tokens = 64
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields what each run of `--sweep` changes: learning rates half a decade apart."""
  read_config(FinetuneConfig, config)
  for rate in multiples(config.optimizer.learning_rate, (0.3, 1.0, 3.0, 10.0)):
    yield {"optimizer.learning_rate": rate}
