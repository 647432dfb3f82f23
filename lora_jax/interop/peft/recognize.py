"""Recognizes why an adapter's tensors are not the expected ones, and says what to do about it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from lora_jax.models.checkpoints.recognize import Stored, first_match, quantized_tensor

_FOLDERS = (  # pattern of a file or folder, and what it says of the folder
  (
    "adapters.safetensors",
    "it holds an adapter of MLX: fuse it there (mlx_lm.fuse --de-quantize), and load the fused "
    "folder as a model",
  ),
  (
    "pytorch_lora_weights.safetensors",
    "it holds a LoRA of diffusers, for a model of images, which lora_jax does not have",
  ),
  (
    "axes/metadata",
    "it holds an adapter of this project: read it by lora_jax.training.checkpoint.restore_adapter",
  ),
  ("peft/adapter_config.json", "it is the folder of a run: give its folder peft"),
  ("checkpoint-*/adapter_config.json", "it is a Trainer's output: give one of its checkpoint-*"),
  ("*/adapter_config.json", "an adapter is in a folder inside it: give that one"),
  ("config.json", "it holds a whole model: load it by lora_jax.models.zoo.load_causal_lm"),
)
_FORMATS = (  # names of tensors, and the format
  (r"^lora_(unet|te\d?|transformer)_|\.lora_(down|up)\.weight$|^lycoris_", "kohya-ss"),
  (r"^(unet|text_encoder(_2)?|transformer\.(single_)?transformer_blocks)\.", "diffusers"),
  (r"\.lora_[ab](\.weight)?$", "MLX or torchtune"),
  (r"\.(linear_in|linear_out)\.weight$|\.adapter_layer\.", "NeMo"),
)
_METHODS = (  # names of tensors, and their `peft_type`, or the method
  (r"(^|\.)prompt_embeddings$|\.prompt_encoder\.", "PROMPT_TUNING or PREFIX_TUNING"),
  (r"\.ia3_l(\.|$)", "IA3"),
  (r"\.lora_E(\.|$)", "ADALORA"),
  (r"\.lora_[AB]\.weight$", "LORA"),
  (r"\.hira_(embedding_)?[AB](\.|$)", "HIRA"),
  (r"\.hada_w[12]_[ab](\.|$)", "LOHA"),
  (r"\.lokr_w[12](_[ab])?(\.|$)", "LOKR"),
  (r"\.miss_block(\.|$)", "MISS"),
  (r"\.vera_lambda_[bd](\.|$)", "VERA"),
  (r"\.(oft|boft)_[rRs](\.|$)", "OFT or BOFT"),
  (r"\.randlora_\w+(\.|$)", "RANDLORA"),
  (r"\.unilora_\w+(\.|$)", "UNILORA"),
  (r"\.tinylora_\w+(\.|$)", "TINYLORA"),
  (r"\.(fourierft_spectrum|hra_u|vblora_logits)(\.|$)", "another method of PEFT"),
  (r"\.token_adapter\.", "trainable tokens (trainable_token_indices)"),
  (r"\.trainable_tokens_\w+(\.|$)", "TRAINABLE_TOKENS"),
  (r"\.ln_tuning_layers\.", "LN_TUNING"),
)
_WRAPPERS = (  # prefixes, and what put them there
  ("_orig_mod.", "torch.compile", "model._orig_mod"),
  ("module.", "DistributedDataParallel", "model.module"),
  ("base_model.base_model.model.", "a second wrapper of PEFT", "the inner PEFT model"),
)
_PREFIX = "base_model.model."


class Mismatch(NamedTuple):
  """The tensors of a file, and those of its config, of the method `peft_type`, and the model."""

  stored: Mapping[str, Stored]
  expected: Mapping[str, tuple[int, ...]]
  peft_type: str = "LORA"

  @property
  def missing(self) -> list[str]:
    return [name for name in self.expected if name not in self.stored]

  @property
  def unexpected(self) -> list[str]:
    return [name for name in self.stored if name not in self.expected]

  @property
  def misshapen(self) -> list[str]:
    pairs = self.expected.items()
    return [n for n, shape in pairs if n in self.stored and self.stored[n].shape != shape]

  def faults(self) -> list[str]:
    """Returns a text for each tensor that is missing, unexpected or misshapen."""
    return [
      *(f"missing {name} {self.expected[name]}" for name in self.missing),
      *(f"unexpected {name} {self.stored[name].shape}" for name in self.unexpected),
      *(
        f"{name} has shape {self.stored[name].shape}, expected {self.expected[name]}"
        for name in self.misshapen
      ),
    ]


def describe_folder(folder: Path) -> str:
  """Returns what a folder without PEFT's files is, and the remedy; empty if unknown."""
  return next((text for pattern, text in _FOLDERS if any(folder.glob(pattern))), "")


def describe_mismatch(tensors: Mismatch) -> str:
  """Returns why the tensors are not the expected ones, and the remedy; empty if unknown."""
  causes: tuple[Callable[[Mismatch], str], ...] = (
    _foreign,
    _other_method,
    _wrapped,
    _whole_model,
    _quantized,
    _tied_head,
    _resized,
    _magnitudes,
    _depth,
    _transposed,
    _ranks,
  )
  return next((text for cause in causes if (text := cause(tensors))), "")


def _foreign(tensors: Mismatch) -> str:
  for pattern, form in _FORMATS:
    if name := first_match(pattern, tensors.unexpected):
      return (
        f"{name} is a name in the format of {form}, expected PEFT's "
        f"({_PREFIX}... .lora_A.weight). Convert the file, or merge the adapter where it was "
        "trained and load the merged folder as a model"
      )
  return ""


def _other_method(tensors: Mismatch) -> str:
  for pattern, method in _METHODS:
    name = first_match(pattern, tensors.unexpected)
    if name and method != tensors.peft_type:
      return (
        f"{name} is of an adapter of {method}, though adapter_config.json says "
        f"{tensors.peft_type}. Take both files from one training"
      )
  return ""


def _wrapped(tensors: Mismatch) -> str:
  for prefix, wrapper, inner in _WRAPPERS:
    if name := next(
      (n for n in tensors.unexpected if n.startswith(prefix) or f".{prefix}" in n), ""
    ):
      return (
        f"{name} has the prefix {prefix!r} of {wrapper}. Save the adapter from inside it: "
        f"{inner}.save_pretrained(...)"
      )
  bare = [name for name in tensors.unexpected if ".lora_" in name]
  if bare and all(_PREFIX + name in tensors.expected for name in bare):
    return (
      f"the names lack PEFT's prefix {_PREFIX!r}, as {bare[0]}. Save the adapter by PEFT's "
      "save_pretrained, or rename the tensors"
    )
  return ""


def _whole_model(tensors: Mismatch) -> str:
  if not tensors.stored:
    return "the file has no tensors: save the adapter again"
  if "lora_" in "".join(tensors.stored) or any(first_match(p, tensors.stored) for p, _ in _METHODS):
    return ""
  return (
    "the file has no tensors of an adapter: it is a whole model's checkpoint, or another part of "
    "one. Load a model by lora_jax.models.zoo.load_causal_lm; of a fully sharded training, save "
    "the adapter by PEFT's save_pretrained after gathering it"
  )


def _quantized(tensors: Mismatch) -> str:
  if part := quantized_tensor(tensors.unexpected):
    return (
      f"{part.name} is part of the quantized base model (bitsandbytes, GPTQ or AWQ), not of the "
      "adapter. Save the adapter without it: model.save_pretrained(folder, "
      "save_embedding_layers=False); the adapter itself works on the original model"
    )
  return ""


def _tied_head(tensors: Mismatch) -> str:
  """Recognizes an adapted or trained head where the model has none of its own."""
  name = first_match(rf"^{re.escape(_PREFIX)}lm_head\.", tensors.unexpected)
  return tied_head(name) if name else ""


def tied_head(name: str) -> str:
  """Returns the text about a trained head where the model's head is its embedding."""
  return (
    f"{name}: this model's head is its embedding (tied), and PEFT trained a head of its own. Untie "
    "the base model: set tie_word_embeddings to false in its config.json and save its embedding as "
    "lm_head.weight too; or merge the adapter in PEFT and load the merged folder"
  )


def _resized(tensors: Mismatch) -> str:
  for name in tensors.misshapen:
    table = re.search(r"(embed_tokens|lm_head|wte|word_embeddings)(\.base_layer)?\.", name)
    rows = [i for i in range(2) if tensors.stored[name].shape[i:] and tensors.expected[name][i:]]
    if table is None or len(rows) < 2:
      continue
    axis = 1 if name.endswith("lora_embedding_A") else 0
    if ".lora_A." in name or name.endswith("lora_embedding_B"):
      continue  # no axis of the vocabulary
    count, vocab_size = tensors.stored[name].shape[axis], tensors.expected[name][axis]
    if count != vocab_size:
      return resized(name, count, vocab_size)
  return ""


def resized(name: str, count: int, vocab_size: int) -> str:
  """Returns the text about a vocabulary of another size than the model's."""
  more = f"{abs(count - vocab_size)} {'more' if count > vocab_size else 'fewer'}"
  return (
    f"{name} has {count} rows, {more} than the model's vocabulary of {vocab_size}: the adapter was "
    "trained on a model with a resized embedding, as for added tokens. Resize the base model in "
    f"transformers, model.resize_token_embeddings({count}), save it with the adapter's tokenizer "
    "by save_pretrained, and load that folder"
  )


def _magnitudes(tensors: Mismatch) -> str:
  named = "lora_magnitude_vector"
  if any(named in n for n in tensors.unexpected) and not any(named in n for n in tensors.expected):
    return (
      f"the file has {named}s, as in DoRA, but use_dora is not true in adapter_config.json. Take "
      "both files from one training"
    )
  if any(named in n for n in tensors.missing) and not any(named in n for n in tensors.stored):
    return (
      f"use_dora is true in adapter_config.json, but the file has no {named}s, as in plain LoRA. "
      "Take both files from one training"
    )
  return ""


def _depth(tensors: Mismatch) -> str:
  """Recognizes an adapter of fewer or more layers than the model or config has."""
  layers, expected = (
    {int(match[1]) for name in names if (match := re.search(r"\.(\d{1,9})\.", name))}
    for names in (tensors.stored, tensors.expected)
  )
  if tensors.misshapen or not layers or not (layers < expected or layers > expected > set()):
    return ""
  return (
    f"the file has factors of layers {_numbers(layers)}, expected {_numbers(expected)}: the base "
    "model has another depth, or layers_to_transform is missing, or the file is incomplete"
  )


def _transposed(tensors: Mismatch) -> str:
  wrong = tensors.misshapen
  if wrong and all(tensors.stored[n].shape == tensors.expected[n][::-1] for n in wrong):
    return (
      f"{wrong[0]} is transposed: PEFT's A is (rank, in) and its B (out, rank). Transpose them, "
      "or save the adapter by PEFT"
    )
  return ""


def _ranks(tensors: Mismatch) -> str:
  ranks = {
    (tensors.stored[name].shape[0], tensors.expected[name][0])
    for name in tensors.misshapen
    if name.endswith(".lora_A.weight")
    and tensors.stored[name].shape[1:] == tensors.expected[name][1:]
  }
  if ranks and not tensors.missing and not tensors.unexpected:
    pairs = ", ".join(f"{rank} for {expected}" for rank, expected in sorted(ranks)[:4])
    return (
      f"the file's ranks are not those of adapter_config.json ({pairs}): r or rank_pattern there "
      "has been changed, or the files are of two trainings"
    )
  return ""


def _numbers(numbers: set[int]) -> str:
  ordered = sorted(numbers)
  if ordered == list(range(ordered[0], ordered[-1] + 1)) and len(ordered) > 1:
    return f"{ordered[0]} to {ordered[-1]}"
  return ", ".join(map(str, ordered[:8])) + (", ..." if len(ordered) > 8 else "")
