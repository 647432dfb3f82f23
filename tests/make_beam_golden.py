"""Writes tests/golden/beam: a tiny GPT-2 and the beam searches of `transformers`.

    pip install torch transformers safetensors    # the versions are written into the file
    python tests/make_beam_golden.py

The weights are random, scaled up so that some continuations are far likelier than others, and
the end tokens get a bias through their embeddings, so that hypotheses end at different lengths.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden" / "beam"
VOCAB_SIZE = 160
EOS_IDS = (0, 7)
NUM_PROMPTS = 200
SETTINGS = [
  {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4, "max_new_tokens": 24},
  {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4, "max_new_tokens": 24},
  {"num_beams": 4, "length_penalty": 1.3, "no_repeat_ngram_size": 2, "max_new_tokens": 31},
  {"num_beams": 3, "length_penalty": -0.5, "no_repeat_ngram_size": 0, "max_new_tokens": 5},
  {"num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "max_new_tokens": 24},
]


def make_model():
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.GPT2Config(
    vocab_size=VOCAB_SIZE,
    n_positions=64,
    n_embd=48,
    n_layer=2,
    n_head=3,
    bos_token_id=0,
    eos_token_id=0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
  )
  model = transformers.GPT2LMHeadModel(config).eval()
  with torch.no_grad():
    for name, tensor in model.named_parameters():
      if tensor.ndim == 2:
        tensor.mul_(18 if "wte" in name else 8)
    model.transformer.wte.weight[list(EOS_IDS)] *= 1.8
  return model


def make_prompts() -> list[list[int]]:
  rng = np.random.default_rng(0)
  return [rng.integers(1, VOCAB_SIZE, rng.integers(1, 33)).tolist() for _ in range(NUM_PROMPTS)]


def search(model, prompts, **settings) -> list[tuple[list[int], float]]:
  """Returns the generated tokens, the end token included, and the score of each prompt."""
  import torch

  hypotheses = []
  for prompt in prompts:
    out = model.generate(
      input_ids=torch.tensor([prompt]),
      attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
      do_sample=False,
      early_stopping=False,
      eos_token_id=list(EOS_IDS),
      pad_token_id=0,
      output_scores=True,
      return_dict_in_generate=True,
      **settings,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    ends = [i for i, token in enumerate(tokens) if token in EOS_IDS]
    tokens = tokens[: ends[0] + 1] if ends else tokens
    score = float(out.sequences_scores[0]) if settings["num_beams"] > 1 else None
    hypotheses.append((tokens, score))
  return hypotheses


def main() -> None:
  import torch
  import transformers

  torch.set_num_threads(1)
  model, prompts = make_model(), make_prompts()
  model.save_pretrained(FOLDER)
  (FOLDER / "generation_config.json").unlink()
  cases = []
  for i, settings in enumerate(SETTINGS):
    chosen = prompts if i == 0 else prompts[:24]
    hypotheses = search(model, chosen, **settings)
    lengths = [len(tokens) for tokens, _ in hypotheses]
    print(settings, "lengths", np.bincount(lengths))
    cases.append(
      {
        "settings": settings,
        "tokens": [tokens for tokens, _ in hypotheses],
        "scores": [score for _, score in hypotheses],
      }
    )
  made_by = {"transformers": transformers.__version__, "torch": torch.__version__}
  golden = {"made_by": made_by, "eos_ids": EOS_IDS, "prompts": prompts, "cases": cases}
  (FOLDER / "golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main()
