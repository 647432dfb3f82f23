"""Adapters from and to llama.cpp's format: orientation, names, scalings, and strict reading."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.adapters.delta import LoraWeight, adapter_weights
from lora_jax.adapters.targets import find_leaves
from lora_jax.axes import LoraAxes
from lora_jax.interop import load_gguf_adapter, load_peft, save_gguf_adapter
from lora_jax.models.gpt2 import folder as gpt2_folder
from lora_jax.models.gpt2.model import GPT2Config
from lora_jax.models.llama import folder as llama_folder
from lora_jax.models.llama.config_json import read_config
from lora_jax.trees import leaves_with_path, nest

from tests import make_gguf_adapter_golden as golden
from tests.make_peft_golden import GOLDEN, MODELS

LINEAR = r".*/(kernel|gate|up|down)"


@functools.cache
def base(name, scan_layers=False):
  """Returns a small model's config and the shapes of its params."""
  if name.startswith("gpt2"):
    config = gpt2_folder.read_config(MODELS / name, scan_layers=scan_layers)
    config = dataclasses.replace(config, activation="gelu_new")  # the only one in llama.cpp
    return config, gpt2_folder.params_shapes(config)
  config = read_config(MODELS / name, scan_layers=scan_layers)
  return config, llama_folder.params_shapes(config)


def random_adapter(name, scan_layers=False, **settings):
  """Returns a config and factors of random numbers, different everywhere."""
  config = lj.LoraConfig(**{"rank": 2, "alpha": 6.0, "target": LINEAR} | settings)
  generator, nodes = np.random.default_rng(0), []
  targets, extra = find_leaves(config, base(name, scan_layers)[1])
  for target in targets.values():
    *batch, inputs, outputs = target.leaf.shape
    axes = tuple(range(len(batch)))
    if target.stacked_layers is not None:
      batch[0] = len(target.stacked_layers)
    a, b = (*batch, inputs, target.rank), (*batch, target.rank, outputs)
    a, b = (generator.normal(size=shape).astype(np.float32) for shape in (a, b))
    axes = LoraAxes(axes, (len(axes),), (len(axes) + 1,))
    nodes.append((target.keys, LoraWeight(a, b, axes, target.stacked_layers)))
  nodes += [(keys, np.ones(leaf.shape, np.float32)) for keys, leaf in extra.values()]
  return config, nest(nodes)


def save(path, name, adapter, scan_layers=False, **options):
  save_gguf_adapter(path, *adapter, *base(name, scan_layers), **options)
  return path


def read(path):
  """Returns the fields and arrays of a file by llama.cpp's own package."""
  gguf = pytest.importorskip("gguf")
  reader = gguf.GGUFReader(path)
  fields = {key: field.contents() for key, field in reader.fields.items()}
  return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def deltas(adapter, name, scan_layers=False):
  """Returns `scaling * A B` of each adapted leaf, zeros where a layer is not adapted."""
  config, trainable = adapter
  targets, _ = find_leaves(config, base(name, scan_layers)[1])
  found = {}
  for path, weight in adapter_weights(trainable).items():
    delta = targets[path].scaling * np.asarray(weight.lora_a) @ np.asarray(weight.lora_b)
    found[path] = np.zeros(targets[path].leaf.shape, np.float32)
    found[path][... if weight.layers is None else list(weight.layers)] = delta
  return found


def delta_of_file(fields, arrays, weight):
  """Returns a weight's change as llama.cpp computes it, (out, in), by its formulas."""
  a, b = (arrays[f"{weight}.lora_{factor}"] for factor in "ab")
  alpha, rank = fields["adapter.lora.alpha"], b.shape[-1]
  return (alpha / rank if alpha else 1.0) * b @ a


def check_equal(got, expected, rtol=1e-5):
  assert got.keys() == expected.keys()
  for path, array in expected.items():
    np.testing.assert_allclose(got[path], array, rtol, rtol * np.abs(array).max(), err_msg=path)


def test_a_file_by_llama_cpps_rules():
  """PEFT's adapter and its conversion, made by other code, are the same adapter."""
  config, params = base("llama/llama3")
  tensors = llama_folder.stored_tensors(config)
  got = load_gguf_adapter(golden.FOLDER / "llama.gguf", config, params)
  expected = load_peft(GOLDEN / "llama", tensors, params)
  assert got[0] == expected[0]
  jax.tree.map(np.testing.assert_array_equal, got[1], expected[1])


def test_the_written_file_has_the_same_tensors(tmp_path):
  config, params = base("llama/llama3")
  adapter = load_peft(GOLDEN / "llama", llama_folder.stored_tensors(config), params)
  path = save(tmp_path / "new.gguf", "llama/llama3", adapter, base_model="llama/llama3")
  (written, arrays), (expected, same) = read(path), read(golden.FOLDER / "llama.gguf")
  assert arrays.keys() == same.keys()
  for name, array in same.items():
    np.testing.assert_array_equal(arrays[name], array)
  of_writer = {"GGUF.tensor_count", "GGUF.kv_count", "general.name", "general.quantization_version"}
  assert {key: expected[key] for key in expected if key not in of_writer} == {
    key: written[key] for key in written if key not in of_writer
  }


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "gemma", "mixtral", "qwen2_moe"])
def test_llamas_round_trip(name, scan_layers, tmp_path):
  name = f"llama/{name}"
  adapter = random_adapter(name, scan_layers)
  path = save(tmp_path / "new.gguf", name, adapter, scan_layers)
  back = load_gguf_adapter(path, *base(name, scan_layers))
  check_equal(deltas(back, name, scan_layers), deltas(adapter, name, scan_layers))
  for got, expected in zip(jax.tree.leaves(back[1]), jax.tree.leaves(adapter[1]), strict=True):
    np.testing.assert_array_equal(got, expected)  # alpha is not folded into B


def test_only_query_and_key_of_the_architecture_llama_are_interleaved(tmp_path):
  """Their rows are permuted like those of the weights; A and all others are as they are."""
  for name, heads in (("llama/llama3", {"q": 4, "k": 2}), ("llama/qwen2", {})):
    adapter = random_adapter(name)
    fields, arrays = read(save(tmp_path / f"{name[6:]}.gguf", name, adapter))
    ours, leaves = deltas(adapter, name), {"q": "query", "k": "key", "v": "value", "output": "out"}
    for short, leaf in leaves.items():
      expected = ours[f"layers_1/attn/{leaf}/kernel"].T
      plain = delta_of_file(fields, arrays, f"blk.1.attn_{short}.weight")
      if short in heads:
        assert np.abs(plain - expected).max() > 0.1, "not permuted"
        expected = golden.permuted(expected, heads[short])
      np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)
      a = adapter_weights(adapter[1])[f"layers_1/attn/{leaf}/kernel"].lora_a
      np.testing.assert_array_equal(arrays[f"blk.1.attn_{short}.weight.lora_a"], a.T)


def test_the_names_and_shapes_of_a_mixture(tmp_path):
  """Experts are stacked, gate and up apart."""
  name = "llama/mixtral"
  path = save(tmp_path / "new.gguf", name, random_adapter(name))
  fields, arrays = read(path)
  assert fields["general.architecture"] == "llama"
  shapes = {key: array.shape for key, array in arrays.items() if key.startswith("blk.1.ffn")}
  assert shapes == {
    "blk.1.ffn_gate_inp.weight.lora_a": (2, 16),
    "blk.1.ffn_gate_inp.weight.lora_b": (4, 2),
    "blk.1.ffn_gate_exps.weight.lora_a": (4, 2, 16),
    "blk.1.ffn_gate_exps.weight.lora_b": (4, 12, 2),
    "blk.1.ffn_up_exps.weight.lora_a": (4, 2, 16),
    "blk.1.ffn_up_exps.weight.lora_b": (4, 12, 2),
    "blk.1.ffn_down_exps.weight.lora_a": (4, 2, 12),
    "blk.1.ffn_down_exps.weight.lora_b": (4, 16, 2),
  }


def test_gpt2_is_not_transposed(tmp_path):
  """Also where a weight is square, and swapped factors would load and compute nonsense."""
  name, adapter = "gpt2/tied", random_adapter("gpt2/tied", target=r".*/(out|up|down)/kernel")
  fields, arrays = read(save(tmp_path / "new.gguf", name, adapter))
  assert fields["general.architecture"] == "gpt2"
  names = {"attn/out": "attn_output", "mlp/up": "ffn_up", "mlp/down": "ffn_down"}
  for leaf, tensor in names.items():
    weight = f"blk.1.{tensor}.weight"
    expected = deltas(adapter, name)[f"h_1/{leaf}/kernel"].T
    np.testing.assert_allclose(delta_of_file(fields, arrays, weight), expected, 1e-5, 1e-5)
  assert arrays["blk.1.attn_output.weight.lora_a"].shape == (2, 32)
  assert arrays["blk.1.attn_output.weight.lora_b"].shape == (32, 2)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_query_and_value_of_gpt2_are_one_weight_of_twice_the_rank(scan_layers, tmp_path):
  name = "gpt2/tied"
  adapter = random_adapter(name, scan_layers, target=r".*/attn/(query|value)/kernel")
  path = save(tmp_path / "new.gguf", name, adapter, scan_layers)
  fields, arrays = read(path)
  assert fields["adapter.lora.alpha"] == 12  # of the sum of the ranks
  assert arrays["blk.1.attn_qkv.weight.lora_a"].shape == (4, 32)
  assert not arrays["blk.1.attn_qkv.weight.lora_b"][32:64].any()
  stack = (lambda leaf: f"h/{leaf}") if scan_layers else (lambda leaf: f"h_1/{leaf}")
  ours = deltas(adapter, name, scan_layers)
  parts = [ours.get(stack(f"attn/{leaf}/kernel")) for leaf in ("query", "key", "value")]
  parts = [np.zeros((32, 32)) if p is None else p[1] if scan_layers else p for p in parts]
  got = delta_of_file(fields, arrays, "blk.1.attn_qkv.weight")
  np.testing.assert_allclose(got, np.concatenate(parts, axis=1).T, rtol=1e-5, atol=1e-5)
  back = deltas(load_gguf_adapter(path, *base(name, scan_layers)), name, scan_layers)
  zeros = {path: array for path, array in back.items() if path not in ours}
  assert len(zeros) == (1 if scan_layers else 2), "key"
  assert not any(array.any() for array in zeros.values())
  check_equal({path: back[path] for path in ours}, ours)


@pytest.mark.parametrize("name", ["gpt2/untied", "llama/llama_biased"])
def test_an_embedding_with_a_head_of_its_own(name, tmp_path):
  adapter = random_adapter(name, target=r".*(token_embedding|wte)/embedding|lm_head/kernel")
  path = save(tmp_path / "new.gguf", name, adapter)
  arrays = read(path)[1]
  config, _ = base(name)
  width = config.embed_dim
  assert {key: array.shape for key, array in arrays.items()} == {
    "token_embd.weight.lora_a": (config.vocab_size, 2),
    "token_embd.weight.lora_b": (width, 2),
    "output.weight.lora_a": (2, width),
    "output.weight.lora_b": (config.vocab_size, 2),
  }
  a, b = (arrays[f"token_embd.weight.lora_{factor}"] for factor in "ab")
  leaf = next(path for path in deltas(adapter, name) if path.endswith("embedding"))
  np.testing.assert_allclose(3.0 * a @ b.T, deltas(adapter, name)[leaf], rtol=1e-5, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, load_gguf_adapter(path, *base(name))[1], adapter[1])


def test_one_alpha_is_written_and_several_are_folded_into_b(tmp_path):
  name = "llama/llama3"
  cases = {  # rules, and alpha in the file
    "one": ((), 6),
    "other ranks": ([lj.LoraRule(".*/up/.*", rank=4)], 6),
    "rank-stabilized": ([lj.LoraRule(".*/up/.*", rank=4, alpha=6 * math.sqrt(4))], 0),
    "other alphas": ([lj.LoraRule(".*/up/.*", alpha=-1.5)], 0),
  }
  for case, (rules, alpha) in cases.items():
    adapter = random_adapter(name, rules=rules)
    path = save(tmp_path / f"{case}.gguf", name, adapter)
    assert read(path)[0]["adapter.lora.alpha"] == alpha, case
    check_equal(deltas(load_gguf_adapter(path, *base(name)), name), deltas(adapter, name))


def test_an_alpha_that_float32_cannot_hold_is_not_written(tmp_path):
  """It would become 0, which means a scaling of 1."""
  name = "llama/llama3"
  path = save(tmp_path / "tiny.gguf", name, random_adapter(name, alpha=1e-50))
  fields, arrays = read(path)
  assert fields["adapter.lora.alpha"] == 0
  assert not any(array.any() for name, array in arrays.items() if name.endswith(".lora_b"))


def test_some_layers_of_a_stack(tmp_path):
  name = "llama/llama3"
  adapter = random_adapter(name, scan_layers=True, stacked_layers=[1])
  path = save(tmp_path / "new.gguf", name, adapter, scan_layers=True)
  assert {key.split(".")[1] for key in read(path)[1]} == {"1"}
  back = load_gguf_adapter(path, *base(name, scan_layers=True))
  check_equal(deltas(back, name, True), deltas(adapter, name, True))


def grouped(adapter, name, size, scan_layers=False):
  """Returns QA-LoRA in groups of `size` inputs, with the first A of each group."""
  variant = lj.qa_lora_variant(size)
  config = dataclasses.replace(adapter[0], variant=variant)
  targets, nodes = find_leaves(config, base(name, scan_layers)[1])[0], []
  for path, weight in adapter_weights(adapter[1]).items():
    arrays = weight.arrays | {"lora_a": weight.lora_a[..., ::size, :]}
    node = LoraWeight.from_arrays(arrays, variant.table, weight.axes, weight.layers)
    nodes.append((targets[path].keys, node))
  return config, nest(nodes)


@pytest.mark.parametrize(
  ("name", "scan_layers", "settings"),
  [
    ("llama/llama3", False, {}),
    ("llama/mixtral", True, {"target": r"layers/.*/(kernel|gate|up|down)", "stacked_layers": [1]}),
    ("gpt2/tied", True, {"target": r".*/attn/(query|value)/kernel"}),
  ],
)
def test_qa_lora_is_written_as_the_lora_that_it_is(name, scan_layers, settings, tmp_path):
  """The file's LoRA changes each weight as QA-LoRA's own merge does."""
  size, params = 4, base(name, scan_layers)[1]
  adapter = grouped(random_adapter(name, scan_layers, **settings), name, size, scan_layers)
  path = save(tmp_path / "new.gguf", name, adapter, scan_layers)
  back = load_gguf_adapter(path, *base(name, scan_layers))
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), params)
  merged = lj.lora(lambda params: None, adapter[0]).merge(zeros, jax.device_put(adapter[1]))
  got, changed = deltas(back, name, scan_layers), adapter_weights(adapter[1])
  for leaf, array in leaves_with_path(merged):
    if leaf in changed or leaf in got:
      np.testing.assert_allclose(got[leaf], array, 1e-5, 1e-5, err_msg=leaf)


def test_float16(tmp_path):
  name = "llama/llama3"
  adapter = random_adapter(name)
  path = save(tmp_path / "new.gguf", name, adapter, dtype="float16")
  assert {array.dtype for array in read(path)[1].values()} == {np.dtype(np.float16)}
  back = load_gguf_adapter(path, *base(name))
  check_equal(deltas(back, name), deltas(adapter, name), rtol=1e-3)


def test_pefts_own_adapter_of_gpt2_has_the_same_factors(tmp_path):
  """A and B of a Conv1D are (rank, in) and (out, rank) in PEFT already."""
  name = "gpt2/tied"
  config, params = base(name)
  assert isinstance(config, GPT2Config)
  adapter = load_peft(GOLDEN / "fused", gpt2_folder.stored_tensors(config), params)
  arrays = read(save(tmp_path / "new.gguf", name, adapter))[1]
  peft = load_file(GOLDEN / "fused" / "adapter_model.safetensors")
  for factor in "AB":
    np.testing.assert_array_equal(
      arrays[f"blk.1.attn_qkv.weight.lora_{factor.lower()}"],
      peft[f"base_model.model.transformer.h.1.attn.c_attn.lora_{factor}.weight"],
    )
