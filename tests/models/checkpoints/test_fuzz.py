"""Damaged configs and safetensors are read, or refused with a ValueError that names the file."""

import json
import math
import struct

import numpy as np
import pytest

from lora_jax.models.bert.folder import read_config as read_bert
from lora_jax.models.checkpoints.hub import FLOATS, open_tensors
from lora_jax.models.deberta.folder import read_config as read_deberta
from lora_jax.models.gpt2.folder import read_config as read_gpt2
from lora_jax.models.llama.config_json import read_config as read_llama

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
