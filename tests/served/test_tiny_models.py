"""Small models and their adapters compute in llama.cpp what they compute here."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.interop import save_gguf_adapter
from lora_jax.models.checkpoints.gguf import open_gguf, write_gguf
from lora_jax.models.zoo import load_causal_lm

from tests.served.agreement import NUM_GREEDY, compare
from tests.served.llama_cpp import Adapter, LlamaCpp, missing
from tests.served.tiny_models import CONFIGS, make_tiny
from tests.toy_models import randomized

pytestmark = pytest.mark.served
PROMPT = np.random.default_rng(5).integers(0, 200, 13).tolist()
LINEAR = r"(layers|h)_.*/kernel"
HEAD = r"lm_head/kernel"
EXPERTS = r".*/experts/(gate|up|down)"
TABLE_OF_GELU = {"gelu_new", "gelu_pytorch_tanh"}  # of float16 in llama.cpp, on CPUs
RULES = (
  lj.LoraRule(r".*/attn/.*", rank=2, alpha=5.0),
  lj.LoraRule(r".*/down/.*", alpha=4 / math.sqrt(3), rank=3),  # as rank-stabilized LoRA has it
)
ADAPTERS = {  # a model, and settings of the adapter
  "linear weights and head": ("llama", {"target": (LINEAR, HEAD)}),
  "linear weights, scanned": ("llama", {"target": r"layers/.*/kernel"}),
  "one layer, scanned": ("llama", {"target": r"layers/.*/kernel", "stacked_layers": (1,)}),
  "embedding": ("llama", {"target": r"token_embedding/embedding"}),
  "ranks and scalings that differ": ("llama", {"target": LINEAR, "rules": RULES}),
  "rank-stabilized scaling": ("llama", {"target": LINEAR, "alpha": 8 * math.sqrt(4)}),
  "linear weights of a tied model": ("llama_tied", {"target": LINEAR}),
  "QA-LoRA, as the LoRA that it is": ("llama", {"variant": lj.qa_lora_variant(8)}),
  "linear weights with biases": ("llama_biased", {"target": LINEAR}),
  "Qwen 2": ("qwen2", {"target": LINEAR}),
  "Qwen 3": ("qwen3", {"target": (LINEAR, HEAD)}),
  "Gemma": ("gemma", {"target": LINEAR}),
  "experts and router of Mixtral": ("mixtral", {"target": (LINEAR, EXPERTS)}),
  "experts, shared and not, of Qwen 2": (
    "qwen2_moe",
    {"target": (LINEAR, EXPERTS), "rules": (lj.LoraRule(r".*/shared_gate/kernel", rank=1),)},
  ),
  "experts of Qwen 3, scanned": (
    "qwen3_moe",
    {"target": (r"layers/.*/kernel", r"layers/.*/experts/(gate|up|down)")},
  ),
  "query and value of GPT-2": ("gpt2", {"target": r".*/attn/(query|value)/kernel"}),
  "square projection of GPT-2": ("gpt2", {"target": r".*/attn/out/kernel"}),
  "linear weights of GPT-2": ("gpt2", {"target": LINEAR}),
  "scalings of GPT-2 that differ": ("gpt2", {"target": LINEAR, "rules": RULES}),
}


def tolerance(config):
  return 1e-3 if config.activation in TABLE_OF_GELU else 1e-5


def adapter_of(tiny, seed=3, **settings):
  """Returns an adapter's config, its functions and a random trainable tree."""
  config = lj.LoraConfig(**{"rank": 4, "alpha": 8.0, "target": LINEAR} | settings)
  lora = lj.lora(tiny.call, config)
  trainable = lora.init(jax.random.key(0), tiny.params, jnp.zeros((1, 4), jnp.int32))
  return config, lora, randomized(trainable, seed=seed)


def save(path, tiny, config, trainable):
  save_gguf_adapter(path, config, trainable, tiny.config, tiny.params)
  return Adapter(path)


def save_arrays(path, architecture, arrays):
  metadata = {"adapter.type": "lora", "adapter.lora.alpha": 8.0}
  write_gguf(path, architecture, metadata, arrays, kind="adapter")
  return Adapter(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_the_same_in_llama_cpp(name, llama_cpp, report, tmp_path):
  model = load_causal_lm(make_tiny(tmp_path, name).path)
  got = compare(llama_cpp, model.folder, model.call, (model.params,), PROMPT)
  report(f"{name:35} {got}")
  assert got.difference < tolerance(model.module.config)
  assert got.num_equal == NUM_GREEDY


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_the_same_in_llama_cpp(name, llama_cpp, report, tmp_path):
  model, settings = ADAPTERS[name]
  tiny = make_tiny(tmp_path, model, scan_layers="scanned" in name)
  config, lora, trainable = adapter_of(tiny, **settings)
  adapter = save(tmp_path / "adapter.gguf", tiny, config, trainable)
  got = compare(llama_cpp, tiny.path, lora.apply, (tiny.params, trainable), PROMPT, adapter)
  base = compare(llama_cpp, tiny.path, tiny.call, (tiny.params,), PROMPT)
  effect = np.abs(got.probabilities - base.probabilities).max()
  report(f"{name:35} {got}, the adapter's effect {effect:.2f}")
  assert effect > 0.05
  assert got.difference < tolerance(tiny.config)
  assert got.num_equal == NUM_GREEDY


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_sliding_window_is_ignored(name, llama_cpp, tmp_path):
  """As docs/serving.md says; if this fails, llama.cpp has learned it."""
  tiny = make_tiny(tmp_path, name)
  file, path = open_gguf(tiny.path), tmp_path / "window.gguf"
  tensors = {name: file.blocks(name) for name in file.tensors}
  metadata = dict(file.metadata) | {f"{name}.attention.sliding_window": 4}
  write_gguf(path, name, metadata, tensors)
  whole, windowed = (llama_cpp.logits(file, PROMPT) for file in (tiny.path, path))
  np.testing.assert_array_equal(whole, windowed)
  model = load_causal_lm(path)
  ours = model.call(model.params, jnp.asarray([PROMPT]))
  assert np.abs(np.asarray(ours)[0, -1] - np.asarray(whole)[-1]).max() > 0.1, (
    "no effect here either"
  )


def test_adapters_are_scaled_switched_and_summed_by_request(llama_cpp, report, tmp_path):
  """Scale 0 is the base model; two adapters at once add up."""
  tiny = make_tiny(tmp_path, "llama")
  config, lora, first = adapter_of(tiny)
  _, _, second = adapter_of(tiny, seed=4)
  one, two = (
    save(tmp_path / f"{i}.gguf", tiny, config, trainable)
    for i, trainable in enumerate((first, second))
  )
  settings, total = lj.weighted_sum([(config, first), (config, second)], [1.0, -0.5], tiny.params)
  summed = lj.lora(tiny.call, settings)
  requests = {
    "scale 0 is the base model": (tiny.call, (), [one._replace(scale=0.0)]),
    "the first of two adapters": (lora.apply, (first,), [one]),
    "the second, by another request": (lora.apply, (second,), [two]),
    "the first again": (lora.apply, (first,), [one, two._replace(scale=0.0)]),
    "the sum, 1 and -0.5": (summed.apply, (total,), [one, two._replace(scale=-0.5)]),
  }
  for name, (fn, trees, adapters) in requests.items():
    got = compare(llama_cpp, tiny.path, fn, (tiny.params, *trees), PROMPT, *adapters)
    report(f"{name:35} {got}")
    assert got.difference < 1e-5, name
    assert got.num_equal == NUM_GREEDY, name


@pytest.mark.parametrize("name", ["out", "down"])
def test_the_official_converters_orientation_of_gpt2_is_wrong(name, llama_cpp, report, tmp_path):
  """A and B swapped: a square weight is loaded and wrong, another one is refused."""
  tiny = make_tiny(tmp_path, "gpt2")
  config, lora, trainable = adapter_of(tiny, target=rf".*/{name}/kernel")
  file = open_gguf(save(tmp_path / "right.gguf", tiny, config, trainable).path)
  arrays = {
    name[:-1] + {"a": "b", "b": "a"}[name[-1]]: file.blocks(name).data.view(np.float32).T
    for name in file.tensors
  }
  swapped = save_arrays(tmp_path / "swapped.gguf", "gpt2", arrays)
  if name == "down":
    with pytest.raises(RuntimeError, match="incorrect shape"):
      llama_cpp.logits(tiny.path, PROMPT, swapped)
    return
  got = compare(llama_cpp, tiny.path, lora.apply, (tiny.params, trainable), PROMPT, swapped)
  report(f"{'swapped factors, which are wrong':35} {got}")
  assert got.difference > 0.05


def test_an_adapter_of_a_tied_embedding_ends_llama_cpp(tmp_path):
  """Which is why we refuse to write it; if this fails, llama.cpp has learned it."""
  if reason := missing():
    pytest.skip(reason)
  tied = make_tiny(tmp_path, "qwen2")
  config, _, trainable = adapter_of(tied, target="token_embedding/embedding")
  with pytest.raises(ValueError, match="tied"):
    save(tmp_path / "refused.gguf", tied, config, trainable)
  factors = trainable["token_embedding"]["embedding"]
  arrays = {
    "token_embd.weight.lora_a": np.asarray(factors.lora_a),
    "token_embd.weight.lora_b": np.asarray(factors.lora_b).T,
  }
  written = save_arrays(tmp_path / "written.gguf", "qwen2", arrays)
  process = LlamaCpp()
  with pytest.raises(RuntimeError, match="GGML_ASSERT"):
    process.logits(tied.path, PROMPT, written)
  process.close()


def test_an_adapter_of_another_model_is_refused(llama_cpp, tmp_path):
  tiny, other = make_tiny(tmp_path, "llama"), make_tiny(tmp_path, "qwen2")
  config, _, trainable = adapter_of(tiny)
  adapter = save(tmp_path / "adapter.gguf", tiny, config, trainable)
  with pytest.raises(RuntimeError, match="arch"):
    llama_cpp.logits(other.path, PROMPT, adapter)
