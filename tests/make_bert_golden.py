"""Makes tests/golden/bert with `transformers`: python -m tests.make_bert_golden

Each folder is a small random BERT or RoBERTa as `save_pretrained` writes it; next to it are
tokens with their mask and types, and the hidden states and the pooler's output or the logits that
`transformers` computes for them.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "bert"
BASE = {
  "vocab_size": 60,
  "max_position_embeddings": 24,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
}
ROBERTA = {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # family, class, config
  "bert": ("Bert", "Model", {}),
  "bert_classifier": ("Bert", "ForSequenceClassification", {"num_labels": 3}),
  "bert_masked": ("Bert", "ForMaskedLM", {"hidden_act": "relu"}),
  "bert_pretraining": ("Bert", "ForPreTraining", {}),
  "roberta": ("Roberta", "Model", ROBERTA),
  "roberta_regression": ("Roberta", "ForSequenceClassification", ROBERTA | {"num_labels": 1}),
  "roberta_masked": ("Roberta", "ForMaskedLM", ROBERTA),
}


def make_model(name: str, seed: int) -> Any:
  """Returns a random model with attention that differs between tokens."""
  import torch
  import transformers

  torch.manual_seed(seed)
  family, kind, shape = MODELS[name]
  config = getattr(transformers, f"{family}Config")(**BASE | shape)
  return randomize(getattr(transformers, family + kind)(config))


def randomize(model: Any) -> Any:
  """Draws the weights of a model so that they matter to its output."""
  import torch

  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 2:
        parameter.copy_(torch.randn(parameter.shape) * 1.5 / parameter.shape[-1] ** 0.5)
      else:
        parameter.add_(0.2 * torch.randn(parameter.shape))
  return model.eval()


def inputs(name: str, seed: int) -> dict[str, np.ndarray]:
  """Returns two rows, the second of which is padded."""
  roberta = MODELS[name][0] == "Roberta"
  draw = np.random.default_rng(seed)
  tokens, mask = draw.integers(3, 60, (2, 13)), np.ones((2, 13), np.int64)
  types = np.zeros((2, 13), np.int64) if roberta else (np.arange(13) >= [[7], [4]]).astype(int)
  mask[1, 9:] = 0
  tokens[1, 9:], types[1, 9:] = int(roberta), 0
  return {"tokens": tokens, "mask": mask, "types": types}


def outputs(model: Any, model_inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the hidden states of `transformers`, and its pooler's output or logits."""
  import torch

  tokens, mask, types = (torch.tensor(x, dtype=torch.int64) for x in model_inputs.values())
  inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
  with torch.no_grad():
    hidden = model.base_model(**inputs)
    tensors = {"hidden": hidden.last_hidden_state}
    if getattr(hidden, "pooler_output", None) is not None:
      tensors["pooled"] = hidden.pooler_output
    if model.__class__.__name__.endswith("ForSequenceClassification"):
      tensors["logits"] = model(**inputs).logits
  return {name: array.numpy() for name, array in tensors.items()}


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
