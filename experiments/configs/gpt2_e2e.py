"""GPT-2 and SmolLM2 on the E2E NLG Challenge (Hu et al. 2021, Tables 3, 11 and 18).

    python -m experiments.gpt2_e2e                                             # mini, on CPUs
    python -m experiments.gpt2_e2e --config=experiments/configs/gpt2_e2e.py:medium
    python -m experiments.gpt2_e2e --config.lora.rank=8 --config.seed=1
    python -m experiments.gpt2_e2e --sweep                                     # the ranks below

Variants: `mini` adapts the embedded base model on part of the data in minutes on 2 CPU cores;
expect 1.464 to 1.473 nats/token and BLEU 43.2 to 49.6. `small`, `medium` and `large` are the
paper's recipe on GPT-2 from the hub or a folder (`--config.model.folder=`). `smollm2` adapts
SmolLM2-135M-Instruct (`make smollm2`) on 4,000 examples; docs/smollm2.md has its results.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.configs import Config
from experiments.configs.method_settings import add_method_settings
from experiments.harness.config import ALL_LINEAR, read_config
from experiments.nlg.config import E2EConfig

# GPT-2's part of harness.config.ALL_LINEAR. Stored configs hold this text, so it must not change.
GPT2_LINEAR = r".*/(attn/(query|key|value|out)|mlp/(up|down))/kernel"
QUERY_AND_VALUE = r".*/attn/(query|value)/kernel"
FULL_RANK = {"mini": 256, "small": 768, "medium": 1024, "large": 1280, "smollm2": 576}
MINI_RATES = {64: 3e-3, 256: 3e-3}  # of the sweep's large ranks


def get_config(variant: str = "mini") -> Config:
  """Returns the config of a variant: mini, small, medium, large or smollm2."""
  if variant not in FULL_RANK:
    raise ValueError(f"variant must be one of {', '.join(FULL_RANK)}, got {variant!r}")
  config: Config = ConfigDict()
  config.experiment = "gpt2_e2e"
  config.variant = variant
  config.workdir = ""  # "" is runs/gpt2_e2e/{name}; {name}: the variant and what differs from here
  config.seed = 110  # of the adapter, the order of the data and dropout; the paper's code has 110
  config.keep_freed_memory = True  # on CPUs: a fifth faster, and half as much memory again
  config.method = "lora"  # of harness/methods.py; frozen_base trains nothing

  config.model = ConfigDict()
  # Any causal language model of the zoo: a Hugging Face folder, a hub repository, a GGUF file, or
  # smollm2; "" is the embedded base model.
  config.model.folder = ""
  config.model.start = "pretrained"  # or random: the same shape with random weights
  config.model.dtype = "float32"  # of the computation; bfloat16 on GPUs and TPUs
  config.model.param_dtype = "float32"  # of the frozen weights; or stored, int8, nf4: quantized
  config.model.rounded_to = ""  # linear weights rounded: Q8_0, Q4_0, nf4, rtn3, rtn2; "" is none
  config.model.scan_layers = False  # True compiles deep models faster
  config.model.remat = ""  # a policy such as nothing_saveable: less memory, more time
  config.model.attention = "compact"  # or xla, or cudnn (on a GPU, with bfloat16)

  config.lora = ConfigDict()
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.lora.dropout = 0.0
  config.lora.target = GPT2_LINEAR  # a pattern of paths, or all-linear
  # kaiming_uniform: A random, B zero (paper, today's code); gaussian: A ~ N(0, 0.02^2), B zero;
  # original_code: A and B ~ N(0, 0.02^2), as in the branch with the paper's own code.
  # copied_blocks: as kaiming_uniform, with one A for all layers (today's code; method=lora).
  config.lora.init = "kaiming_uniform"
  # Tokens whose embeddings are trained, too: texts that are single tokens, or ids; by method=lora,
  # dora, and trainable_tokens, which trains nothing else.
  config.lora.tokens = ()

  add_method_settings(config)  # of methods other than LoRA: method_settings.py

  config.data = ConfigDict()
  config.data.name = "e2e"  # or another data set of experiments/nlg/tasks/table.py
  config.data.any_size = False  # True accepts excerpts of data sets that come as a user's files
  config.data.form = "reference"  # the files of the paper's code; or official, the CSV files
  config.data.source = "embedded"  # or download (official only), or a folder with the files
  config.data.prompt = "separator"  # an end token after the input; or newline, or chat
  config.data.shuffled_completions = False  # True trains on other inputs' texts: a null model
  config.data.num_train_records = 4000  # a fixed random part, the same for every seed; 0 is all
  config.data.num_valid_records = 500  # as above
  config.data.num_epochs = 1
  config.data.packing = True  # several examples per row; False is one per row, as in the paper
  config.data.batch_size = 8  # rows
  config.data.row_length = 192  # tokens
  config.data.loss_length = 112  # supervised tokens of a row, at most
  config.data.max_length = 512  # tokens of an example, which is cut there; at most the model's
  config.data.percent = 0.0  # of the vocabulary that data.name=dial permutes

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 1e-2  # the best of four by validation loss
  config.optimizer.weight_decay = 0.01
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.eps = 1e-6
  config.optimizer.schedule = "linear"  # to 0 after the warmup; or cosine, or constant
  config.optimizer.warmup_steps = 20
  config.optimizer.warmup_share = 0.0  # a share of all steps, instead of warmup_steps
  config.optimizer.clip_norm = 0.0  # of the gradient; 0 disables clipping
  config.optimizer.label_smoothing = 0.0

  config.fit = ConfigDict()
  config.fit.num_train_steps = 0  # 0 follows from num_epochs
  config.fit.eval_every_steps = 100
  config.fit.checkpoint_every_steps = 100
  config.fit.checkpoint_every_seconds = 300.0  # at a line of the log; 0 saves by steps only
  config.fit.log_every_steps = 10
  config.fit.accumulation_steps = 1
  config.fit.loss_chunk = 0  # target tokens of a row whose logits are in memory at once; 0 is all
  config.fit.keep = "best"  # the checkpoint that is decoded: best by validation loss, or last

  config.mesh = ConfigDict()
  config.mesh.data = 1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.distributed = ConfigDict()  # several processes that do one run together: docs/scale.md
  config.distributed.coordinator_address = ""  # HOST:PORT of process 0; auto is what JAX detects
  config.distributed.num_processes = 0  # 0 is what JAX detects
  config.distributed.process_id = -1  # of this process; -1 is what JAX detects

  config.decoding = ConfigDict()
  config.decoding.split = "test"
  config.decoding.num_inputs = 630  # the first of the distinct inputs; 0 decodes nothing
  config.decoding.num_beams = 10
  config.decoding.length_penalty = 0.9  # the paper's; its README has 0.8
  config.decoding.no_repeat_ngram_size = 4
  config.decoding.max_new_tokens = 64
  config.decoding.scoring = "transformers"  # or reference: the rules of the paper's code
  config.decoding.batch_size = 16  # inputs; CPUs decode one batch per core
  config.decoding.num_shots = 0  # solved training examples before each input
  config.decoding.tokenize = False  # True separates punctuation, for models that are not trained
  config.decoding.official_references = False  # True also scores against the challenge's CSV files

  if variant == "smollm2":
    _smollm2(config)
  elif variant != "mini":
    _paper(config, variant)
  return config


def _smollm2(config: Config) -> None:
  """Sets the fields that differ for SmolLM2-135M-Instruct; its examples have 30 to 110 tokens."""
  config.model.folder = "smollm2"
  config.lora.target = ALL_LINEAR
  config.data.update({"prompt": "newline", "row_length": 128, "loss_length": 80})
  config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 0, "warmup_share": 0.02})
  config.fit.update({"eval_every_steps": 1_000_000, "checkpoint_every_steps": 50})
  config.decoding.official_references = True


def _paper(config: Config, variant: str) -> None:
  """Sets the recipe of the paper's Table 11, and of its code for what the table leaves out."""
  config.model.folder = {
    "small": "openai-community/gpt2",
    "medium": "openai-community/gpt2-medium",
    "large": "openai-community/gpt2-large",
  }[variant]
  config.keep_freed_memory = False  # 6 % faster, and twice the memory
  config.lora.update({"rank": 4, "alpha": 32.0, "dropout": 0.1, "target": QUERY_AND_VALUE})
  config.data.update({"num_train_records": 0, "num_valid_records": 0, "num_epochs": 5})
  config.data.update({"packing": False, "batch_size": 8, "row_length": 512, "loss_length": 128})
  config.optimizer.update({"learning_rate": 2e-4, "warmup_steps": 500, "label_smoothing": 0.1})
  config.fit.update({"eval_every_steps": 2000, "checkpoint_every_steps": 1000})
  config.fit.log_every_steps = 100
  config.decoding.batch_size = 64


def sweep(config: Config) -> Iterator[dict[str, object]]:
  """Yields the changed fields of each run: the ranks of the paper's Table 18.

  The paper keeps alpha. `mini` keeps alpha / rank, for which its learning rate was tuned; the large
  ranks diverge at it, and use the better of 1e-3 and 3e-3 (docs/gpt2_e2e.md).
  """
  read_config(E2EConfig, config)
  ranks = (1, 2, 4, 8, 64, FULL_RANK[config.variant])
  if config.variant != "mini":
    yield from ({"lora.rank": rank, "lora.alpha": config.lora.alpha} for rank in ranks)
    return
  scaling, usual = config.lora.alpha / config.lora.rank, config.optimizer.learning_rate
  for rank in ranks:
    rate = MINI_RATES.get(rank, usual)
    yield {"lora.rank": rank, "lora.alpha": scaling * rank, "optimizer.learning_rate": rate}
