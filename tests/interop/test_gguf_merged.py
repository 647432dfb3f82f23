"""QA-LoRA merged into a GGUF file: its minima change, and no other byte does."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters.delta import LoraWeight
from lora_jax.adapters.targets import find_leaves
from lora_jax.axes import LoraAxes
from lora_jax.interop.gguf_merged import save_merged_gguf
from lora_jax.models.checkpoints.gguf import open_gguf
from lora_jax.models.zoo import load_causal_lm
from lora_jax.trees import nest

from tests.gguf_files import quantized, write_model

CONFIG = lj.LoraConfig(1, 2.0, r".*attn/.*/kernel", variant=lj.QA_LORA)


def with_blocks(name, array, kind="Q4_1"):
  is_kernel = array.ndim == 2 and name.startswith("blk.") and array.shape[-1] % 32 == 0
  return quantized(array, kind) if is_kernel else array


def write_base(path, name, kind="Q4_1"):
  return write_model(path / "base.gguf", name, functools.partial(with_blocks, kind=kind))


def adapter(params, config=CONFIG):
  """Returns factors of random numbers."""
  generator, nodes = np.random.default_rng(0), []
  targets, extra = find_leaves(config, params)
  for target in targets.values():
    *batch, inputs, outputs = target.leaf.shape
    axes = tuple(range(len(batch)))
    shapes = {"lora_a": (*batch, inputs // 32, 1), "lora_b": (*batch, 1, outputs)}
    arrays = {name: generator.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    axes = LoraAxes(axes, (len(axes),), (len(axes) + 1,))
    nodes.append((target.keys, LoraWeight.from_arrays(arrays, lj.QA_LORA.table, axes, None)))
  nodes += [(keys, np.ones(leaf.shape, np.float32)) for keys, leaf in extra.values()]
  return nest(nodes)


def save(path, base, model, config=CONFIG, trainable=None):
  trainable = adapter(model.params, config) if trainable is None else trainable
  tensors = model.stored_in_folder()
  return save_merged_gguf(path, base, config, trainable, tensors, model.params)


@pytest.mark.parametrize(("name", "scan"), [("llama3", False), ("llama3", True), ("tied", False)])
def test_minima_change_and_no_other_byte(tmp_path, name, scan):
  """Also where outputs of query and key are interleaved, and where the three are fused."""
  base, path = write_base(tmp_path, name), tmp_path / "merged.gguf"
  model = load_causal_lm(base, param_dtype="stored", scan_layers=scan)
  errors = save(path, base, model)
  merged = load_causal_lm(path, param_dtype="stored", scan_layers=scan)
  expected, same_errors = lj.merge_quantized(CONFIG, model.params, adapter(model.params))
  jax.tree.map(np.testing.assert_array_equal, merged.params, expected)
  assert errors == same_errors
  assert 0 < max(errors.values()) < 5e-3

  before, after = (np.fromfile(file, np.uint8) for file in (base, path))
  changed = np.flatnonzero(before != after) if before.size == after.size else None
  minima = np.zeros(before.size, bool)
  for tensor, place in open_gguf(base).tensors.items():
    if "attn" in tensor and place.type == "Q4_1":
      for offset in (2, 3):  # of the minimum in a block of 20 bytes
        minima[place.offset + offset : place.offset + place.size : 20] = True
  assert len(changed) > 0.4 * minima.sum()
  assert minima[changed].all()


def test_unsupported_merges_are_refused(tmp_path):
  base, path = write_base(tmp_path, "llama3"), tmp_path / "new" / "merged.gguf"
  model = load_causal_lm(base, param_dtype="stored")

  def refused(words, error=ValueError, **settings):
    with pytest.raises(error, match=words):
      save(path, **{"base": base, "model": model} | settings)
    assert not path.parent.exists()

  extra = dataclasses.replace(CONFIG, extra="final_norm/scale")
  refused(
    "final_norm/scale is fully trained; its tensor in .*base.gguf would round it", config=extra
  )
  floats = load_causal_lm(base)
  refused(r"kernel is not quantized", model=floats)
  other = write_base(tmp_path / "other", "llama2")
  refused("has other numbers than params: load params from this file", base=other)
  q4_0 = write_base(tmp_path / "q4_0", "llama3", "Q4_0")
  of_q4_0 = load_causal_lm(q4_0, param_dtype="stored")
  refused("stored as Q4_0, .* expected one of Q4_1, Q5_1", base=q4_0, model=of_q4_0)


def test_no_file_is_overwritten(tmp_path):
  base = write_base(tmp_path, "llama3")
  before = base.read_bytes()
  with pytest.raises(FileExistsError, match="nothing is overwritten"):
    save(base, base, load_causal_lm(base, param_dtype="stored"))
  assert base.read_bytes() == before
  assert len(list(tmp_path.iterdir())) == 1
