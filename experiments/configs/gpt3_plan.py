"""The plan of GPT-3 175B on a pod: Hu et al. 2021, app. D.4 (rank 4 on query and value, AdamW)."""

from ml_collections import ConfigDict

from experiments.configs import Config


def get_config() -> Config:
  """Returns the config; `--topology`, `--model` and `--base` are its fields of these names."""
  config: Config = ConfigDict()
  config.experiment = "gpt3_plan"
  config.variant = "plan"
  config.workdir = ""  # "" is runs/gpt3_plan/<what differs from this file>
  config.seed = 0  # of the keys, which are compiled in no program
  config.topology = "v5p:4x4x4"  # a TPU and its chips; v5e:16x16; or cpu:8, emulated devices
  # gpt3, gpt2_medium, llama3_8b, llama3_70b, deberta_xxl; or a folder with config.json.
  config.model = "gpt3"
  config.base = "bfloat16"  # of LoRA's frozen weights; or float32, int8, nf4
  config.remat = "nothing_saveable"  # what layers keep for the backward pass; "" is everything
  config.methods = ("lora", "full_finetuning")  # the columns

  config.lora = ConfigDict()
  config.lora.rank = 4
  config.lora.alpha = 32.0
  config.lora.dropout = 0.0
  config.lora.target = r".*/attn/(query|value)/kernel"  # or all-linear

  config.data = ConfigDict()
  config.data.batch_size = 0  # rows; 0 is one for each part of the mesh's data x fsdp
  config.data.row_length = 512  # tokens
  config.data.loss_chunk = 0  # target tokens of a row whose logits are in memory at once; 0 is all

  config.mesh = ConfigDict()  # fsdp is what these two leave of the chips
  config.mesh.data = 1  # copies of the model
  config.mesh.tensor = 4  # parts of each layer's computation
  return config
