"""SmolLM2's own file, with an adapter that was trained on its blocks: llama.cpp's texts and ours.

For quantized weights llama.cpp rounds the activations to 8 bits, in blocks of 32; we do not. So its
probabilities differ a little, and a greedy text may differ where two tokens are about as likely.
In a file with the same weights in float32 it rounds nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.interop import save_gguf_adapter
from lora_jax.interop.gguf_merged import save_merged_gguf
from lora_jax.models.checkpoints.gguf import open_gguf, write_gguf

from tests.served import smollm2
from tests.served.agreement import NUM_GREEDY, compare, softmax
from tests.served.llama_cpp import Adapter, LlamaCpp

pytestmark = [
  pytest.mark.served,
  pytest.mark.skipif(smollm2.model_file() is None, reason="SmolLM2 is not cached: make smollm2"),
]
NUM_PROMPTS, MAX_NEW_TOKENS, MAX_LENGTH = 20, 48, 80
NUM_STEPS, NUM_MERGED_STEPS, LEARNING_RATE = 16, 12, 4e-3
LORA = lj.LoraConfig(rank=16, alpha=32.0, target=smollm2.TARGET)
QA_LORA = lj.LoraConfig(rank=8, alpha=32.0, target=smollm2.TARGET, variant=lj.QA_LORA)


@pytest.fixture(scope="module")
def base():
  return smollm2.load("stored")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
  """Returns our function with the adapter, its arguments, and the adapter's file."""
  trained = smollm2.train(lj.lora, base, LORA, NUM_STEPS, LEARNING_RATE)
  assert np.mean(trained.losses[-4:]) < 0.8 * trained.losses[0], trained.losses
  path = tmp_path_factory.mktemp("adapter") / "e2e.gguf"
  save_gguf_adapter(path, LORA, trained.trainable, base.module.config, base.params)
  lora = lj.lora(base.call, LORA)
  return lora.apply, (base.params, trained.trainable), Adapter(path)


class Texts(NamedTuple):
  """Greedy texts of llama.cpp next to ours.

  Attributes:
    num_texts: all.
    num_equal: how many are the same.
    differences: of the probability of each of llama.cpp's tokens.
    first: for each text that differs, our probability of our first other token less that of
      llama.cpp's token: 0 is a tie.
    example: the first of them in words.
  """

  num_texts: int
  num_equal: int
  differences: np.ndarray
  first: list[float]
  example: str

  def __str__(self) -> str:
    mean, largest = self.differences.mean(), self.differences.max()
    return (
      f"{self.num_equal} of {self.num_texts} texts equal, {self.differences.size} tokens, "
      f"probabilities differ by {mean:.4f} on average and {largest:.3f} at most; "
      f"{self.example or 'no text differs'}"
    )


def compare_texts(
  llama_cpp: LlamaCpp,
  model: Path,
  fn: Callable[..., Any],
  arguments: tuple[Any, ...],
  *adapters: Adapter,
  num_texts: int = NUM_PROMPTS,
) -> Texts:
  """Compares the greedy texts after E2E inputs with those of `fn(*arguments, tokens)`."""
  run = jax.jit(lambda arguments, x: fn(*arguments, x))
  num_equal, differences, first, examples = 0, [], [], []
  for prompt in smollm2.prompts(num_texts):
    steps = llama_cpp.greedy(model, prompt, MAX_NEW_TOKENS, *adapters, stop=[smollm2.END])
    tokens = [step.token for step in steps]
    row = [*prompt, *tokens]
    row += [smollm2.END] * (MAX_LENGTH - len(row))
    logits = np.asarray(run(arguments, jnp.asarray([row]))[0])
    ours = softmax(logits[len(prompt) - 1 : len(prompt) - 1 + len(tokens)])
    pairs = list(zip(ours, steps, strict=True))
    differences += [abs(p[step.token] - step.top[step.token]) for p, step in pairs]
    other = [(p, step) for p, step in pairs if p.argmax() != step.token]
    if not other:
      num_equal += 1
      continue
    p, step = other[0]
    first.append(float(p.max() - p[step.token]))
    words = [smollm2.tokenizer().decode([i]) for i in (step.token, p.argmax())]
    theirs = [step.top.get(i, 0.0) for i in (step.token, int(p.argmax()))]
    examples.append(
      f"the first that differs has {words[0]!r} there ({theirs[0]:.3f} against {theirs[1]:.3f}) "
      f"and {words[1]!r} here ({p[step.token]:.3f} against {p.max():.3f})"
    )
  return Texts(num_texts, num_equal, np.asarray(differences), first, "".join(examples[:1]))


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
  """The same model with every weight in float32."""
  import gguf

  file = open_gguf(smollm2.model_file())
  tensors = {}
  for name, tensor in file.tensors.items():
    kind = gguf.GGMLQuantizationType[tensor.type]
    tensors[name] = gguf.quants.dequantize(tensor.bytes(), kind).reshape(tensor.shape)
  path = tmp_path_factory.mktemp("float") / "float32.gguf"
  metadata = {
    key: value
    for key, value in file.metadata.items()
    if not key.startswith("general.") and value != []
  }
  write_gguf(path, file.architecture, metadata, tensors)
  yield path
  path.unlink()


def test_in_float32_probabilities_are_equal(base, adapter, float_file, llama_cpp, report):
  prompt = smollm2.prompts(1)[0]
  fn, arguments, path = adapter
  for name, function, trees, adapters in (
    ("SmolLM2 in float32", lj.dequantized(base.call), (base.params,), ()),
    ("the same with the adapter", fn, arguments, (path,)),
  ):
    got = compare(llama_cpp, float_file, function, trees, prompt, *adapters)
    report(f"{name:35} {got}")
    assert got.difference < 1e-4
    assert got.num_equal == NUM_GREEDY


@pytest.mark.parametrize("name", ["untrained", "adapter"])
def test_texts_on_the_stored_weights(name, base, adapter, llama_cpp, report):
  file, (fn, arguments, path) = smollm2.model_file(), adapter
  if name == "adapter":
    got = compare_texts(llama_cpp, file, fn, arguments, path)
  else:
    got = compare_texts(llama_cpp, file, lj.dequantized(base.call), (base.params,))
  report(f"{'SmolLM2, ' + name:35} {got}")
  assert name != "adapter" or got.num_equal >= NUM_PROMPTS / 2
  assert got.differences.mean() < 0.02
  assert max(got.first, default=0.0) < 0.1, "these tokens are not about as likely"


def test_an_exact_merge_needs_no_adapter(base, llama_cpp, report, tmp_path):
  """QA-LoRA in the minima of the file's blocks: a file of the same size."""
  file, merged = smollm2.model_file(), tmp_path / "merged.gguf"
  trained = smollm2.train(lj.qa_lora, base, QA_LORA, NUM_MERGED_STEPS, LEARNING_RATE)
  tensors = base.stored_in_folder()
  errors = save_merged_gguf(merged, file, QA_LORA, trained.trainable, tensors, base.params)
  assert merged.stat().st_size == file.stat().st_size
  adapted = lj.qa_lora(base.call, QA_LORA)
  arguments = base.params, trained.trainable
  got = compare_texts(llama_cpp, merged, adapted.apply, arguments)
  unmerged = compare_texts(llama_cpp, file, adapted.apply, arguments, num_texts=4)
  report(f"{'SmolLM2, QA-LoRA merged':35} {got}")
  report(f"{'QA-LoRA against the base file':35} {unmerged}")
  mean, largest = np.mean(list(errors.values())), max(errors.values())
  rounding = f"{mean:.3f} of a weight's update on average, {largest:.3f} at most"
  report(f"{'rounding of the minima to float16':35} {rounding}")
  assert largest < 0.1, "too much of the update is lost to compare texts"
  assert got.differences.mean() < 0.02
  assert max(got.first, default=0.0) < 0.1
  assert unmerged.differences.mean() > 2 * got.differences.mean()
