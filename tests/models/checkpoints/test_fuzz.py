"""Damaged configs and weights are read, or refused with a ValueError that names the file."""

import json
import math
import struct

import numpy as np
import pytest

from lora_jax.models.bert.folder import read_config as read_bert
from lora_jax.models.checkpoints.gguf import open_gguf, write_gguf
from lora_jax.models.checkpoints.hub import FLOATS, open_tensors
from lora_jax.models.deberta.folder import read_config as read_deberta
from lora_jax.models.gpt2.folder import read_config as read_gpt2
from lora_jax.models.llama.config_json import read_config as read_llama
from lora_jax.models.zoo import plan_causal_lm

from tests.gguf_files import ARCHITECTURES, metadata_of, tensors_of, write_model
from tests.models.bad_inputs import FOLDERS, WEIGHTS

READERS = {
  "gpt2": read_gpt2,
  "qwen2_mixed": read_llama,
  "qwen3_moe": read_llama,
  "llama3": read_llama,
  "classifier": read_bert,
  "deberta": read_deberta,
}
VALUES = [
  *(None, True, "", "x", "1", -1, 0, 1, 1.5, 10**9, 10**30, math.inf, math.nan),
  *([], [1], ["x"], [[1]], {}, {"a": 1}),
]
FIELDS = ("rope_scaling", "layer_types", "num_labels", "id2label", "pos_att_type", "head_dim")


def error_of(call):
  """Returns the message of a ValueError, or None."""
  try:
    call()
  except ValueError as error:
    return str(error)
  return None


def read_all(folder):
  with open_tensors(folder) as tensors:
    for name in tensors:
      if tensors.dtype(name) in FLOATS:
        assert tensors.read(name).shape == tensors.shape(name)


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_any_value_of_any_field(name, tmp_path):
  source = FOLDERS[name]
  (tmp_path / WEIGHTS).symlink_to(source / WEIGHTS)
  written = json.loads((source / "config.json").read_text())
  for field in {*written, *FIELDS}:
    for value in VALUES:
      (tmp_path / "config.json").write_text(json.dumps(written | {field: value}))
      message = error_of(lambda: READERS[name](tmp_path))
      assert message is None or "config.json" in message


@pytest.mark.long
def test_damaged_safetensors(tmp_path):
  """Bytes of the header and its length are changed, removed and inserted."""
  whole = (FOLDERS["gpt2"] / WEIGHTS).read_bytes()
  (length,) = struct.unpack("<Q", whole[:8])
  draw, refused = np.random.default_rng(0), 0
  for _ in range(2000):
    damaged = bytearray(whole)
    for _ in range(draw.integers(1, 4)):
      start = draw.integers(8 if draw.integers(2) else 8 + length)
      removed, added = draw.integers(0, 2, 2)
      damaged[start : start + removed] = draw.integers(0, 256, int(added), np.uint8).tobytes()
    (tmp_path / WEIGHTS).write_bytes(damaged)
    message = error_of(lambda: read_all(tmp_path))
    assert message is None or WEIGHTS in message
    refused += message is not None
  assert refused > 1000


@pytest.mark.long
def test_damaged_gguf(tmp_path):
  """Bytes of the header and of its counts are changed, removed and inserted."""
  path = write_model(tmp_path / "whole.gguf", "llama2")
  whole = path.read_bytes()
  data = min(tensor.offset for tensor in open_gguf(path).tensors.values())
  draw, refused = np.random.default_rng(0), 0
  for _ in range(2000):
    damaged = bytearray(whole)
    for _ in range(draw.integers(1, 4)):
      start = draw.integers(24 if draw.integers(2) else data)
      removed, added = draw.integers(0, 2, 2)
      damaged[start : start + removed] = draw.integers(0, 256, int(added), np.uint8).tobytes()
    (tmp_path / "model.gguf").write_bytes(damaged)
    message = error_of(lambda: plan_causal_lm(tmp_path / "model.gguf"))
    assert message is None or "model.gguf" in message
    refused += message is not None
  assert refused > 1000


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama3", "mixtral", "qwen2_moe", "tied"])
def test_any_value_of_any_key(name, tmp_path):
  metadata, path = metadata_of(name), tmp_path / "model.gguf"
  keys = [*metadata, "llama.rope.scaling.type", "split.count", "split.no", "general.alignment"]
  keys += ["tokenizer.ggml.tokens", "qwen2moe.expert_weights_norm"]
  values = [True, "", "x", -1, 0, 1, 3, 1.5, 10**9, 2**63, math.inf, math.nan, [1], ["x"], [0.5]]
  for key in keys:
    for value in values:
      path.unlink(missing_ok=True)
      write_gguf(path, ARCHITECTURES[name], metadata | {key: value}, tensors_of(name))
      message = error_of(lambda: plan_causal_lm(path))
      assert message is None or "model.gguf" in message
