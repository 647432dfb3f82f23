"""GGUF files are read as llama.cpp writes them: header, tensors, configs and weights."""

import dataclasses
import itertools
import struct
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.models.checkpoints.gguf import Blocks, is_gguf, open_gguf, write_gguf
from lora_jax.models.checkpoints.gguf_split import split_gguf
from lora_jax.models.checkpoints.gguf_tensors import dequantized
from lora_jax.models.checkpoints.pretrained import cached_path
from lora_jax.models.gpt2 import gguf as gpt2_gguf
from lora_jax.models.gpt2.model import GPT2Config
from lora_jax.models.llama import gguf as llama_gguf
from lora_jax.models.llama.model import LlamaConfig, MixtureConfig
from lora_jax.models.zoo import load_causal_lm, plan_causal_lm
from lora_jax.quantization.formats import FORMATS
from lora_jax.quantization.ggml import join
from lora_jax.quantization.leaf import is_quantized
from lora_jax.training.mesh import make_mesh
from lora_jax.trees import leaves_with_path, weights_with_path

from tests.gguf_files import (
  ARCHITECTURES,
  folder_of,
  llama3_factors,
  metadata_of,
  quantized,
  tensors_of,
  write_model,
  write_random,
)
from tests.toy_models import relative_difference

SIZE = {"vocab_size": 40, "num_positions": 16, "num_layers": 2}
LLAMA = LlamaConfig(**SIZE, embed_dim=64, num_heads=2, num_kv_heads=1, mlp_dim=128, tie_head=True)
EXPERTS = dataclasses.replace(LLAMA, mixture=MixtureConfig(3, 2), tie_head=False)
SHARED = dataclasses.replace(EXPERTS, qkv_bias=True, mixture=MixtureConfig(3, 2, False, 64))
MODELS = {
  "llama": (LLAMA, llama_gguf),
  "mixtral": (EXPERTS, llama_gguf),
  "qwen2_moe": (SHARED, llama_gguf),
  "gpt2": (GPT2Config(**SIZE, embed_dim=64, num_heads=2), gpt2_gguf),
}
SCANS = (False, True)


def assert_same(params, expected):
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def values_of(leaf):
  """Returns the values of a leaf, those of blocks by the package."""
  if not is_quantized(leaf):
    return leaf
  values = dequantized(join(FORMATS[leaf.format], leaf.arrays), leaf.format)
  return np.moveaxis(values, -1, leaf.axis)


def shapes(tree):
  return [(path, leaf.shape, leaf.dtype) for path, leaf in leaves_with_path(tree)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_params_are_those_of_the_folder(name, tmp_path):
  path = write_model(tmp_path / "model.gguf", name)
  for scan_layers in SCANS:
    model = load_causal_lm(path, scan_layers=scan_layers)
    folder = load_causal_lm(folder_of(name), scan_layers=scan_layers)
    read, expected = dict(leaves_with_path(model.params)), dict(leaves_with_path(folder.params))
    assert read.keys() == expected.keys()
    for leaf, array in expected.items():
      if name == "gemma" and leaf.endswith("norm/scale"):  # stored + 1, so rounded
        np.testing.assert_allclose(read[leaf], array, rtol=0, atol=1e-7)
      else:
        np.testing.assert_array_equal(read[leaf], array, err_msg=leaf)
    config, same = model.module.config, folder.module.config
    implied = ("mlp_dim", "activation") if model.model_type == "gpt2" else ("head_dim",)
    changes = {field: getattr(same, field) for field in implied}
    assert dataclasses.replace(config, **changes) == same
    assert (model.model_type, model.folder) == (folder.model_type, path)
    assert {leaf for tensor in model.stored for leaf in tensor.paths} == read.keys()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scan_layers", SCANS)
def test_stored_blocks_have_the_values_and_the_bytes_of_the_file(name, scan_layers, tmp_path):
  path = write_random(tmp_path / "model.gguf", *MODELS[name], "Q5_0")
  stored = load_causal_lm(path, param_dtype="stored", scan_layers=scan_layers)
  floats = load_causal_lm(path, scan_layers=scan_layers)
  values = jax.tree.map(values_of, stored.params, is_leaf=is_quantized)
  assert_same(values, floats.params)
  for leaf, array in weights_with_path(stored.params):
    is_matrix = leaf.endswith(("kernel", "embedding")) or "/experts/" in leaf
    is_matrix = is_matrix and array.shape[-1] > 1  # the gate of a shared expert is a vector there
    assert is_quantized(array) == is_matrix, leaf
  size = sum(tensor.size for tensor in open_gguf(path).tensors.values())
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(stored.params)) == size
  planned = plan_causal_lm(path, param_dtype="stored", scan_layers=scan_layers)
  assert shapes(planned.params) == shapes(stored.params)
  assert "Q5_0 and float32" in repr(stored)
  count = sum(leaf.size for leaf in jax.tree.leaves(floats.params))
  assert repr(stored).startswith(f"LanguageModel({name}, {count:,} parameters")


@pytest.mark.parametrize(
  ("name", "format_", "scan_layers"),
  [
    ("gpt2", "int8", False),
    *(
      pytest.param("qwen2_moe", *case, marks=pytest.mark.long)
      for case in itertools.product(("int8", "nf4"), SCANS)
    ),
  ],
)
def test_linear_weights_are_quantized_while_loading(name, format_, scan_layers, tmp_path):
  path = write_random(tmp_path / "model.gguf", *MODELS[name], "Q8_0")
  model = load_causal_lm(path, param_dtype=format_, scan_layers=scan_layers)
  floats = load_causal_lm(path, scan_layers=scan_layers)
  linear = r".*/(attn|mlp|shared)/(query|key|value|out|gate|up|down)/kernel|.*/experts/.*"
  expected = dict(weights_with_path(lj.quantize(floats.params, format_, linear)))
  stored = dict(
    weights_with_path(load_causal_lm(path, param_dtype="stored", scan_layers=scan_layers).params)
  )
  for leaf, array in weights_with_path(model.params):
    other = expected[leaf] if is_quantized(expected[leaf]) else stored[leaf]
    assert repr(array) == repr(other) or not is_quantized(other)
    assert_same(array, other)
  table = stored["wte/embedding" if name == "gpt2" else "lm_head/kernel"]
  assert table.format == "Q8_0"
  planned = plan_causal_lm(path, param_dtype=format_, scan_layers=scan_layers)
  assert shapes(planned.params) == shapes(model.params)


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.long), True])
def test_devices_read_their_own_parts(scan_layers, tmp_path):
  """Codes too, on a mesh or on one device; other shardings do not say which axis is which."""
  mesh = make_mesh(data=1, fsdp=2, tensor=2)
  specs = {"kernel": P("fsdp", "tensor"), "embedding": P(None, "tensor"), "bias": P("tensor")}

  def sharding(path, leaf):
    last = leaf.ndim - 1 if path.endswith("bias") else leaf.ndim - 2
    spec = specs.get(path.rpartition("/")[2], P())
    return NamedSharding(mesh, P(*(None,) * last, *spec) if spec else spec)

  def shardings(shapes):
    leaves = [sharding(path, leaf) for path, leaf in leaves_with_path(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

  for name, dtype in (
    ("gpt2", "stored"),
    ("gpt2", "int8"),
    ("llama", "float32"),
    ("llama", "stored"),
  ):
    path = tmp_path / f"{name}.gguf"
    if not path.exists():
      write_random(path, *MODELS[name], "Q4_0")
    options = {"param_dtype": dtype, "scan_layers": scan_layers}
    whole, parts = (load_causal_lm(path, **options, shardings=s) for s in (None, shardings))
    assert_same(parts.params, whole.params)
    plan = plan_causal_lm(path, **options, shardings=shardings)
    for (leaf, array), (_, planned) in zip(
      leaves_with_path(parts.params), leaves_with_path(plan.params), strict=True
    ):
      assert planned.sharding.is_equivalent_to(array.sharding, array.ndim), leaf
  device = SingleDeviceSharding(jax.devices()[1])
  on_device = load_causal_lm(path, **options, shardings=device)
  assert {leaf.sharding for leaf in jax.tree.leaves(on_device.params)} == {device}
  kernel = parts.params["layers" if scan_layers else "layers_0"]["mlp"]["up"]["kernel"]
  with pytest.raises(ValueError, match=r"which str does not say .* Give NamedSharding"):
    kernel.shardings("fsdp")
  codes = kernel.arrays["qs"]  # of (64, 128): 128 rows of 2 blocks
  assert codes.addressable_shards[0].data.shape[-3:] == (64, 1, 16)


@pytest.mark.parametrize(
  ("kind", "array"),
  [
    ("F16", lambda x: x.astype(np.float16)),
    ("F32", lambda x: x),
    ("BF16", lambda x: Blocks("BF16", np.asarray(jnp.asarray(x, "bfloat16")).view(np.uint8))),
    ("F64", lambda x: Blocks("F64", x.astype(np.float64).view(np.uint8))),
  ],
)
def test_floats_of_all_kinds(kind, array, tmp_path):
  path = write_model(tmp_path / "model.gguf", "llama2", lambda name, x: array(x))
  assert {tensor.type for tensor in open_gguf(path).tensors.values()} == {kind}
  stored = load_causal_lm(path, param_dtype="stored").params
  dtype = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(stored)} == {dtype}
  expected = load_causal_lm(folder_of("llama2")).params
  assert_same(stored, jax.tree.map(lambda leaf: leaf.astype(dtype), expected))


def test_a_folder_of_bfloat16_keeps_its_dtype(tmp_path):
  model = load_causal_lm(folder_of("qwen2"), param_dtype="bfloat16")
  model.save(tmp_path / "model", model.params)
  for scan_layers in SCANS:
    options = {"param_dtype": "stored", "scan_layers": scan_layers}
    stored = load_causal_lm(tmp_path / "model", **options).params
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(stored)} == {"bfloat16"}
    assert shapes(plan_causal_lm(tmp_path / "model", **options).params) == shapes(stored)
  int8 = load_causal_lm(tmp_path / "model", param_dtype="int8").params["layers_0"]
  assert int8["mlp"]["up"]["kernel"].format == "int8"
  assert int8["mlp_norm"]["scale"].dtype == jnp.bfloat16


def test_a_copy_of_the_embedding_is_a_tied_head(tmp_path):
  tensors = tensors_of("tied")
  for name, head in (
    ("tied", tensors["token_embd.weight"]),
    ("new", tensors["token_embd.weight"] + 1),
  ):
    path = tmp_path / f"{name}.gguf"
    write_gguf(path, "gpt2", metadata_of("tied"), {**tensors, "output.weight": head})
    model = load_causal_lm(path)
    assert model.module.config.tie_head == ("lm_head" not in model.params) == (name == "tied")


@pytest.mark.parametrize(
  ("factor", "low", "high", "length", "theta", "size"),
  [
    (8.0, 1.0, 4.0, 8192, 500000.0, 128),  # Llama 3.1
    (32.0, 1.0, 4.0, 8192, 500000.0, 64),  # Llama 3.2
    (8.0, 2.0, 6.0, 4096, 10000.0, 128),
  ],
)
def test_the_scaling_of_llama_3_is_found_from_its_factors(
  factor, low, high, length, theta, size, tmp_path
):
  config = dataclasses.replace(LLAMA, head_dim=size, rope_theta=theta)
  rope = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
  rope |= {"original_max_position_embeddings": length, "rope_theta": theta}
  tensors = {"rope_freqs.weight": llama3_factors(rope, size)}
  metadata = llama_gguf.written_metadata(config) | {"tokenizer.ggml.tokens": ["a", "b"]}
  write_gguf(tmp_path / "model.gguf", "llama", metadata, tensors)
  scaling = llama_gguf.read_config(open_gguf(tmp_path / "model.gguf")).rope_scaling
  found = (scaling.low_freq_factor / low, scaling.high_freq_factor / high)
  np.testing.assert_allclose(found, scaling.original_positions / length, rtol=1e-5)
  assert (scaling.kind, scaling.factor) == ("llama3", factor)


def test_windows_of_some_layers_are_not_written():
  config = dataclasses.replace(LLAMA, sliding_window=8, window_layers=(0,))
  with pytest.raises(ValueError, match="one window for all layers"):
    llama_gguf.written_metadata(config, "llama")


def test_the_package_reads_our_files_and_we_read_its(tmp_path):
  metadata = {
    "llama.block_count": 2,
    "negative": -5,
    "large": 2**40,
    "flag": True,
    "text": "é\n",
    "epsilon": 1e-5,
    "list of text": ["a", ""],
    "list of numbers": [1, -2],
    "list of floats": [0.5, 1.0],
    "list of flags": [True, False],
    "general.type": "adapter",
  }
  array = np.arange(128, dtype=np.float32).reshape(4, 32)
  tensors = {"a": array, "b": quantized(array, "Q4_1"), "c": array.astype(np.float16)[0]}
  write_gguf(tmp_path / "m", "llama", metadata, tensors)
  file, reader = open_gguf(tmp_path / "m"), gguf.GGUFReader(tmp_path / "m")
  fields = {key: reader.fields[key].contents() for key in file.metadata}
  fields["epsilon"] = float(str(np.float32(fields["epsilon"])))
  expected = metadata | {"general.architecture": "llama", "general.type": "model"}
  assert fields == file.metadata == expected
  for tensor in reader.tensors:
    ours = file.tensors[tensor.name]
    assert (ours.type, ours.offset) == (tensor.tensor_type.name, tensor.data_offset)
    assert ours.shape == tuple(tensor.shape[::-1])
    np.testing.assert_array_equal(ours.bytes().reshape(-1), tensor.data.view(np.uint8).reshape(-1))
  assert is_gguf(tmp_path / "m")
  assert not is_gguf(tmp_path)
  copy = {name: file.blocks(name) for name in file.tensors}
  write_gguf(tmp_path / "copy", "llama", file.metadata, copy)
  assert (tmp_path / "copy").read_bytes() == (tmp_path / "m").read_bytes()


def test_version_2_is_read(tmp_path):
  path = write_model(tmp_path / "model.gguf", "llama2")
  data = bytearray(path.read_bytes())
  data[4:8] = struct.pack("<I", 2)
  path.write_bytes(data)
  assert_same(load_causal_lm(path).params, load_causal_lm(folder_of("llama2")).params)


def split(folder, name, count=2):
  """Writes a model in several parts, as llama-gguf-split does; returns the first."""
  tensors = tensors_of(name)
  for i in range(count):
    part = dict(list(tensors.items())[i::count])
    fields = {"split.no": i, "split.count": count, "split.tensors.count": len(tensors)}
    fields |= metadata_of(name) if i == 0 else {}
    path = folder / f"model-{i + 1:05}-of-{count:05}.gguf"
    write_gguf(path, ARCHITECTURES[name], fields, part)
  return folder / f"model-00001-of-{count:05}.gguf"


def test_all_parts_of_a_split_model_are_read(tmp_path):
  model = load_causal_lm(split(tmp_path, "mistral", 3))
  assert_same(model.params, load_causal_lm(folder_of("mistral")).params)


def test_a_file_is_split_into_parts_below_a_size(tmp_path):
  """All parts together are the file; llama.cpp reads the number of a part as uint16 only."""
  path, limit = write_model(tmp_path / "model.gguf", "mistral"), 30_000
  parts = split_gguf(path, tmp_path / "parts", limit)
  assert len(parts) > 2
  assert all(part.stat().st_size < limit for part in parts)
  assert b"split.no\x02\0\0\0\0\0" in parts[0].read_bytes()
  whole, joined = open_gguf(path), open_gguf(parts[0])
  assert list(joined.tensors) == list(whole.tensors)
  for name in whole.tensors:
    assert joined.blocks(name).type == whole.blocks(name).type
    np.testing.assert_array_equal(joined.blocks(name).data, whole.blocks(name).data)
  assert whole.metadata.items() <= joined.metadata.items()
  again = split_gguf(parts[0], tmp_path / "again", 10**6)  # of a file that is split already
  assert [part.name for part in again] == [f"{parts[0].stem}-00001-of-00001.gguf"]
  with pytest.raises(ValueError, match="which no part of less than 2,000 bytes can hold"):
    split_gguf(path, tmp_path / "other", 2000)
  assert not (tmp_path / "other").exists()


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path):
  array = np.zeros(2, np.int64)
  for metadata, tensors in (({}, {"a": array}), ({"a": None}, {}), ({"a": [1, "b"]}, {})):
    with pytest.raises(ValueError, match=r"a is .*, expected"):
      write_gguf(tmp_path / "m.gguf", "llama", metadata, tensors)
  write_gguf(tmp_path / "m.gguf", "llama", {}, {})
  with pytest.raises(FileExistsError, match="nothing is overwritten"):
    write_gguf(tmp_path / "m.gguf", "llama", {}, {})
  assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_smollm2_takes_the_bytes_of_its_tensors():
  path = cached_path("smollm2")
  if not path.is_file():
    pytest.skip("SmolLM2 is not cached: make smollm2")
  plan = plan_causal_lm("smollm2", param_dtype="stored", scan_layers=True)
  assert plan.folder == path
  assert "134,515,008 parameters, Q4_1 and Q8_0 and float32" in repr(plan)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(plan.params))
  assert size == 96_576_768


@pytest.mark.long
def test_no_tensor_of_smollm2_is_in_memory_twice():
  if not cached_path("smollm2").is_file():
    pytest.skip("SmolLM2 is not cached: make smollm2")
  code = """
import jax, resource
from lora_jax.models.zoo import load_causal_lm, plan_causal_lm
jax.devices()
plan_causal_lm("smollm2", param_dtype=PARAM_DTYPE)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_causal_lm("smollm2", param_dtype=PARAM_DTYPE)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
  for dtype, size in (("stored", 96.6), ("bfloat16", 269.1), ("float32", 538.1)):
    line = code.replace("PARAM_DTYPE", repr(dtype))
    run = subprocess.run([sys.executable, "-c", line], check=True, capture_output=True, text=True)
    assert int(run.stdout) / 1000 < size + 25, dtype


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.parametrize("name", ["llama2", "qwen2", "smollm2"])
def test_logits_are_those_of_transformers(name, tmp_path):
  """Of its own reading of the file; of other small models it ignores what ours have: head sizes,
  biases, windows and the factors of the rotation."""
  transformers = pytest.importorskip("transformers", reason="transformers is not installed")
  torch = pytest.importorskip("torch", reason="torch is not installed")
  if name == "smollm2":
    path = cached_path(name)
    if not path.is_file():
      pytest.skip("SmolLM2 is not cached: make smollm2")
  else:
    path = write_model(tmp_path / "model.gguf", name)
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  model = load_causal_lm(path)
  vocab_size = model.module.config.vocab_size
  tokens = np.random.default_rng(0).integers(vocab_size, size=(2, 12))
  with torch.no_grad():
    expected = peer.eval()(torch.tensor(tokens)).logits.numpy()
  logits = jax.jit(model.call)(model.params, jnp.asarray(tokens, jnp.int32))
  assert np.abs(expected).max() > 1, "logits this small would prove little"
  assert relative_difference(logits, expected) < 1e-5
