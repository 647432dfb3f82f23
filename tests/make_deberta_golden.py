"""Makes tests/golden/deberta with `transformers`: python -m tests.make_deberta_golden

Each folder is a small random DeBERTa-v2 or v3 as `save_pretrained` writes it; next to it are
tokens with their mask and types, and the hidden states and logits that `transformers` computes for
them.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.make_bert_golden import outputs, randomize

GOLDEN = Path(__file__).parent / "golden" / "deberta"
BASE = {
  "vocab_size": 60,
  "max_position_embeddings": 24,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "type_vocab_size": 0,
  "relative_attention": True,
  "position_buckets": 8,
  "max_relative_positions": -1,
  "norm_rel_ebd": "layer_norm",
  "share_att_key": True,
  "pos_att_type": "p2c|c2p",
  "position_biased_input": False,
}
CONV = {"conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 8}
UNSHARED = {
  "share_att_key": False,
  "position_buckets": -1,
  "max_relative_positions": 6,
  "norm_rel_ebd": "none",
  "type_vocab_size": 2,
  "position_biased_input": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # class, config
  "v3": ("Model", {}),
  "v3_classifier": ("ForSequenceClassification", {"num_labels": 3}),
  "v3_masked": ("ForMaskedLM", {}),
  "v2_regression": (
    "ForSequenceClassification",
    {**CONV, "num_labels": 1, "pooler_hidden_act": "tanh"},
  ),
  "unshared": ("Model", UNSHARED),
  "one_term": ("Model", {**UNSHARED, "pos_att_type": ["p2c"], "conv_kernel_size": 5}),
}


def make_model(name: str, seed: int) -> Any:
  """Returns a random model with attention that differs between tokens."""
  import torch
  import transformers

  torch.manual_seed(seed)
  kind, shape = MODELS[name]
  config = transformers.DebertaV2Config(**BASE | shape)
  return randomize(getattr(transformers, f"DebertaV2{kind}")(config))


def inputs(name: str, seed: int) -> dict[str, np.ndarray]:
  """Returns two rows, the second of which is padded."""
  draw = np.random.default_rng(seed)
  tokens, mask = draw.integers(3, 60, (2, 13)), np.ones((2, 13), np.int64)
  has_types = MODELS[name][1].get("type_vocab_size", 0) > 0
  types = (np.arange(13) >= [[7], [4]]).astype(int) * has_types
  for array in (tokens, mask, types):
    array[1, 9:] = 0
  return {"tokens": tokens, "mask": mask, "types": types}


def main() -> None:
  from safetensors.numpy import save_file

  shutil.rmtree(GOLDEN, ignore_errors=True)
  for seed, name in enumerate(MODELS):
    model = make_model(name, seed)
    model.save_pretrained(GOLDEN / name)
    (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)
    model_inputs = inputs(name, seed)
    arrays = {key: array.astype(np.int32) for key, array in model_inputs.items()}
    save_file(arrays | outputs(model, model_inputs), GOLDEN / f"{name}.safetensors")
    for path in (GOLDEN / f"{name}.safetensors", GOLDEN / name / "model.safetensors"):
      path.chmod(0o644)


if __name__ == "__main__":
  main()
