"""Writes adapters in MLX's format, for `mlx_lm.generate --model BASE --adapter-path FOLDER`.

    adapter_config.json    {"fine_tune_type": "lora", "num_layers": -1,
                            "lora_parameters": {"rank", "scale", "dropout", "keys"}}
    adapters.safetensors   model.layers.0.self_attn.q_proj.lora_a          (in, rank)    ours
                           model.layers.0.self_attn.q_proj.lora_b          (rank, out)   ours
                           model.embed_tokens.lora_a                       (V, rank)     ours
                           model.layers.0.mlp.switch_mlp.up_proj.lora_a    (experts, rank, in)
                           model.layers.0.mlp.switch_mlp.up_proj.lora_b    (experts, out, rank)

`scale` is our scaling, alpha / rank. All modules share one rank and one scale: smaller ranks are
padded with zeros, and B is rescaled where scalings differ. DoRA adds the magnitude, `m` (out,).
Factors of a tied embedding also adapt the head, as ours do and PEFT's do not.

Source: `tuner/lora.py`, `tuner/dora.py` and `tuner/utils.py` of mlx-lm 0.32.2, which has loaded the
files on Linux.
"""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from lora_jax.adapters.config import LoraConfig
from lora_jax.files import local_path
from lora_jax.interop.peft.fused import Fused, with_one_rank
from lora_jax.interop.peft.modules import Arrays, Module
from lora_jax.interop.peft.parts import check_parts
from lora_jax.models.checkpoints.hub import StoredTensor, new_folder, save_tensors
from lora_jax.models.gpt2 import folder as gpt2_folder
from lora_jax.models.gpt2.model import GPT2Config
from lora_jax.models.llama import folder as llama_folder
from lora_jax.models.llama.model import LlamaConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


def save_mlx(
  folder: str | Path,
  config: LoraConfig,
  trainable: PyTree,
  model: LlamaConfig | GPT2Config,
  params: PyTree,
) -> None:
  """Writes an adapter as a new folder, with which mlx-lm computes the same outputs.

  Args:
    folder: the folder to make.
    config: the adapter's config.
    trainable: the trained tree.
    model: the base model's config.
    params: the base model's params, or their shapes; DoRA of only some of GPT-2's query, key and
      value needs arrays.
  Raises:
    FileExistsError: if there is such a folder.
    ValueError: if the adapter is not for the base model, or MLX cannot express it.
  """
  folder = local_path(folder)
  if folder.exists():
    raise FileExistsError(f"{folder} exists; nothing is overwritten")
  tensors = _tensors(model)
  parts = check_parts(config, trainable, tensors, params).as_lora()
  if parts.extra:
    raise ValueError(
      "MLX's adapters have no fully trained leaves, such as biases, norms or a head: "
      f"{', '.join(list(parts.extra)[:8])}. Merge the adapter instead, lora_jax.interop.save_merged"
    )
  use_dora = parts.uses_dora("MLX")
  if use_dora:
    _check_dora(parts.adapted)
  fused = with_one_rank(parts.fuse(use_dora), config.alpha)
  arrays: Arrays = {}
  for module, joined in fused.items():
    arrays |= _to_file(module, joined)
  joined = next(iter(fused.values()))
  written = {
    "fine_tune_type": "dora" if use_dora else "lora",
    "num_layers": -1,
    "lora_parameters": {
      "rank": joined.rank,
      "scale": joined.scaling,
      "dropout": config.dropout,
      "keys": _keys([_name(module) for module in fused], model.num_layers),
    },
  }
  with new_folder(folder) as temporary:
    (temporary / CONFIG).write_text(json.dumps(written, indent=2) + "\n", "utf-8")
    save_tensors(temporary / WEIGHTS, arrays)


def _tensors(model: LlamaConfig | GPT2Config) -> list[StoredTensor]:
  """Returns the tensors of a model in mlx-lm, which stacks the experts of a layer."""
  if isinstance(model, GPT2Config):
    if not model.tie_head:
      raise ValueError("mlx-lm's GPT-2 has no head of its own; merge the adapter instead")
    return [
      stored._replace(name=stored.name.replace("transformer.", "model.", 1))
      for stored in gpt2_folder.stored_tensors(model)
    ]
  published = llama_folder.stored_tensors(model, published=True)
  return [_stack_experts(stored) for stored in published if not stored.expert]


def _stack_experts(stored: StoredTensor) -> StoredTensor:
  """Returns the first expert's tensor as that of all experts; other tensors unchanged."""
  if stored.expert is None:
    return stored
  leaf = stored.paths[0].rpartition("/")[2]
  name = re.sub(r"experts\.0\.\w+", f"switch_mlp.{leaf}_proj", stored.name)
  return stored._replace(name=name, expert=None, is_parameter=True)


def _check_dora(modules: list[Module]) -> None:
  """Raises ValueError if MLX has no DoRA of these modules, or defines it differently."""
  for module in modules:
    if module.stored.is_parameter or module.stored.is_embedding:
      reason = (
        "has no DoRA of experts"
        if module.stored.is_parameter
        else "normalizes the rows of an embedding, and DoRA here and in PEFT its columns"
      )
      raise ValueError(
        f"{_name(module)}: MLX {reason}. Leave it out of `target`, or take the nearest LoRA, "
        "lora_jax.convert(config, trainable, params, rank=...)"
      )


def _name(module: Module) -> str:
  return module.stored.name.removesuffix(".weight")


def _to_file(module: Module, joined: Fused) -> Arrays:
  """Returns the tensors of a module, by name."""
  a, b = joined.a, joined.b
  if not module.stored.is_parameter:
    a, b = a.T, b.T
  arrays = {f"{_name(module)}.lora_a": a, f"{_name(module)}.lora_b": b}
  if joined.magnitude is not None:
    arrays[f"{_name(module)}.m"] = np.asarray(joined.magnitude)
  return arrays


def _keys(names: list[str], num_layers: int) -> list[str]:
  """Returns MLX's `keys`: names relative to a layer if all layers have them, otherwise full names.

  >>> _keys(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"], 2)
  ['mlp.up_proj', 'lm_head']
  """
  inside = {name: re.sub(r"^model\.(layers|h)\.\d+\.", "", name) for name in names}
  counts = Counter(inside.values())
  keys = (short if counts[short] == num_layers else name for name, short in inside.items())
  return list(dict.fromkeys(keys))
