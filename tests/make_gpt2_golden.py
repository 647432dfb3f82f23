"""Makes tests/golden/gpt2 with `transformers`: python -m tests.make_gpt2_golden

Each folder is a small random GPT-2 as `save_pretrained` writes it; next to it are tokens, with and
without padding, and the logits of `GPT2LMHeadModel`.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "gpt2"
BASE = {"vocab_size": 64, "n_positions": 24, "bos_token_id": 0, "eos_token_id": 0}
SHAPES = {
  "tied": BASE | {"n_embd": 32, "n_layer": 2, "n_head": 4},
  "untied": BASE
  | {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_inner": 80, "activation_function": "gelu"}
  | {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
  "relu": BASE | {"n_embd": 24, "n_layer": 1, "n_head": 1, "activation_function": "relu"},
}
LENGTHS = (11, 3, 8)  # of the rows, padded to the longest


def make_model(shape: dict[str, Any], seed: int) -> Any:
  """Returns a random `GPT2LMHeadModel` with logits of about 10, as in a trained model."""
  import torch
  import transformers

  torch.manual_seed(seed)
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 2:
        parameter.copy_(torch.randn(parameter.shape) * 1.5 / parameter.shape[-1] ** 0.5)
      else:
        parameter.add_(0.2 * torch.randn(parameter.shape))
  return model.eval()


def batches(vocab_size: int, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns tokens and masks, both (rows, time): whole rows, and rows padded on either side."""
  draw = np.random.default_rng(seed)
  tokens = draw.integers(1, vocab_size, (len(LENGTHS), max(LENGTHS)))
  right = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
  masks = {"whole": np.ones_like(right), "right": right, "left": right[:, ::-1]}
  return {name: (np.where(mask, tokens, 0), mask) for name, mask in masks.items()}


def positions(mask: np.ndarray) -> np.ndarray:
  """Returns each token's position in its row, padding not counted."""
  return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Returns the logits of `transformers`."""
  import torch

  with torch.no_grad():
    out = model(
      input_ids=torch.tensor(tokens),
      attention_mask=torch.tensor(mask.astype(np.int64)),
      position_ids=torch.tensor(positions(mask)),
    )
  return out.logits.numpy()


def main() -> None:
  from safetensors.numpy import save_file

  shutil.rmtree(GOLDEN, ignore_errors=True)
  for seed, (name, shape) in enumerate(SHAPES.items()):
    model = make_model(shape, seed)
    model.save_pretrained(GOLDEN / name)
    (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)
    arrays = {}
    for kind, (tokens, mask) in batches(shape["vocab_size"], seed).items():
      arrays[f"{kind}/tokens"] = tokens.astype(np.int32)
      arrays[f"{kind}/mask"] = np.ascontiguousarray(mask)
      arrays[f"{kind}/logits"] = logits(model, tokens, mask)
    save_file(arrays, GOLDEN / f"{name}.safetensors")
    (GOLDEN / f"{name}.safetensors").chmod(0o644)
    (GOLDEN / name / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
  main()
