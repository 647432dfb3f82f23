"""Fine-tunes your model on your data.

    python -m experiments.finetune --model=FOLDER_OR_REPOSITORY --data=mine.jsonl --dry_run
    python -m experiments.finetune --model=FOLDER_OR_REPOSITORY --data=mine.jsonl

Each line of the data is {"prompt": ..., "completion": ...}, or {"messages": [{"role": ...,
"content": ...}, ...]}, for which the model's folder needs a chat template (docs/finetune.md).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs.method_settings import add_method_settings
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
  config.method = "lora"  # or dora, qa_lora; or full_finetuning, at a tenth of the learning rate

  config.model = ConfigDict()
  # A Hugging Face folder, a repository of the hub, a GGUF file, or smollm2 (`make smollm2`).
  config.model.folder = ""
  config.model.dtype = "auto"  # of the computation; auto is bfloat16, or float32 on CPUs
  # Of the frozen weights; auto as above. stored, int8 and nf4 keep them quantized (docs/gguf.md).
  config.model.param_dtype = "auto"
  config.model.scan_layers = False  # True compiles deep models faster
  config.model.remat = ""  # a policy such as nothing_saveable: less memory, more time
  config.model.attention = "compact"  # or xla, or cudnn (on a GPU, with bfloat16)

  config.lora = ConfigDict()
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.lora.dropout = 0.0
  config.lora.target = ALL_LINEAR  # a pattern of paths; all-linear is short for this one
  config.lora.init = "kaiming_uniform"
  # Tokens whose embeddings are trained, too: texts that are single tokens, or ids; by method=lora,
  # dora, and trainable_tokens, which trains nothing else.
  config.lora.tokens = ()

  add_method_settings(config)  # of methods other than LoRA: method_settings.py

  config.data = ConfigDict()
  config.data.file = ""  # JSON lines
  config.data.valid_file = ""  # JSON lines; "" holds out a part of data.file
  config.data.valid_share = 0.05  # the part of data.file that is held out, at least one prompt
  config.data.chat_template = ""  # a file with a Jinja template; "" is the model's
  config.data.today = "2024-07-26"  # the date for templates that write one; fixed
  config.data.ignored_fields = ()  # further fields that lines may have, such as ("id",)
  config.data.row_length = 0  # tokens; 0 is the longest example's, rounded up to a multiple of 64
  config.data.truncate = False  # True truncates longer examples; otherwise they are an error
  config.data.packing = True  # several examples per row, each attending only to itself
  config.data.batch_size = 8  # rows
  config.data.num_epochs = 3

  # LoRA needs a higher learning rate than full fine-tuning of the same model: about ten times
  # (Schulman et al. 2025, "LoRA Without Regret"); three times on our small base model
  # (docs/gpt2_e2e.md: 1e-2 and 3e-3). 2e-4 is that of Hu et al. 2021 for GPT-2 and GPT-3, and of
  # Dettmers et al. 2023 (QLoRA) for 7 B and 13 B parameters; they use 1e-4 for 33 B and 65 B. If
  # the loss falls slowly, try three times as much; if it jumps, a third. `--sweep` tries four.
  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 2e-4
  config.optimizer.weight_decay = 0.0
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.eps = 1e-8
  config.optimizer.schedule = "linear"  # to 0 after the warmup; or cosine, or constant
  config.optimizer.warmup_steps = 10  # at most a tenth of all steps
  config.optimizer.clip_norm = 1.0  # of the gradient; 0 disables clipping

  config.fit = ConfigDict()
  config.fit.eval_every_steps = 100
  config.fit.checkpoint_every_steps = 50
  config.fit.checkpoint_every_seconds = 300.0  # at a line of the log; 0 saves by steps only
  config.fit.log_every_steps = 10
  config.fit.accumulation_steps = 1  # parts of a batch that are processed in turn
  config.fit.loss_chunk = 0  # target tokens of a row whose logits are in memory at once; 0 is all
  config.fit.keep = "best"  # the checkpoint that is exported: best by validation loss, or last

  config.mesh = ConfigDict()
  config.mesh.data = 1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.distributed = ConfigDict()  # several processes that do one run together: docs/scale.md
  config.distributed.coordinator_address = ""  # HOST:PORT of process 0; auto is what JAX detects
  config.distributed.num_processes = 0  # 0 is what JAX detects
  config.distributed.process_id = -1  # of this process; -1 is what JAX detects

  config.samples = ConfigDict()
  config.samples.count = 3  # held-out prompts that are answered at the end, greedily
  config.samples.max_new_tokens = 64  # the longest answer
  return config


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run: learning rates half a decade apart."""
  read_config(FinetuneConfig, config)
  for rate in multiples(config.optimizer.learning_rate, (0.3, 1.0, 3.0, 10.0)):
    yield {"optimizer.learning_rate": rate}
