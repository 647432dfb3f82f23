"""Thousands of damaged adapters load to the same values, or raise an error that names the fault."""

import json
import random
import resource
import struct
import time

import jax
import numpy as np
import pytest

from lora_jax.interop import load_peft

from tests.interop.bad_inputs import CONFIG, WEIGHTS, base, header_of, with_header
from tests.make_peft_golden import GOLDEN

pytestmark = pytest.mark.long

MUTATIONS = 2000
SECONDS = 2.0  # of the processor, for one load
MEGABYTES = 500  # that all loads may add
VALUES = (
  *(
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    10**18,
    10**30,
    -(10**18),
    0.5,
    -0.0,
    1e308,
    1e-308,
  ),
  *(float("nan"), float("inf"), "", "x", "c_attn", "lora_A", "(", "(a+)+", ".*", "\x00", "é" * 50),
  *([], {}, [[]], [None], [0, 0], [-1, 4], {"": 0}, {"a": {"b": []}}, "F32", "F16", "I8", "BF16"),
)


def mutated_bytes(rng, content):
  """Returns bytes with some of them changed, removed, repeated or inserted."""
  content = bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 8))):
    if not content:
      break
    start, count = rng.randrange(len(content)), rng.choice((1, 1, 4, 64))
    near = min(start, rng.randrange(1, 2000)) if rng.random() < 0.7 else start  # in the header
    piece = bytes(content[near : near + count])
    content[near : near + count] = rng.choice(
      (b"", piece * 2, rng.randbytes(count), bytes(b ^ 1 << rng.randrange(8) for b in piece))
    )
  return bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content)


def mutated_value(rng, value):
  """Returns a JSON value with one item changed, removed or renamed."""
  if isinstance(value, dict | list) and value and rng.random() < 0.8:
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    action = rng.random()
    if action < 0.15:
      del copy[key]
    elif action < 0.3 and isinstance(copy, dict):
      copy[rng.choice((key[:-1], key + "s", key.upper(), "extra"))] = copy.pop(key)
    else:
      copy[key] = mutated_value(rng, copy[key])
    return copy
  return rng.choice(VALUES)


def mutated_text(rng, value):
  """Returns JSON text of a changed value, or changed bytes of it."""
  text = json.dumps(mutated_value(rng, value) if rng.random() < 0.8 else value)
  if rng.random() < 0.05:
    text = text.replace("4", rng.choice(("[" * 5000, '{"a":' * 5000, "9" * 5000)), 1)
  return mutated_bytes(rng, text.encode()) if rng.random() < 0.2 else text.encode()


def mutated_header(rng, content):
  header, data = header_of(content)
  return with_header(mutated_text(rng, header), data)


def mutated_size(rng, content):
  sizes = (0, 1, 2, 7, 8, len(content), 2**32, 10**18, 2**64 - 1)
  return struct.pack("<Q", rng.choice(sizes)) + content[8:]


@pytest.mark.parametrize("kind", ["config", "bytes", "header", "size"])
def test_a_damaged_adapter_is_read_or_named(kind, tmp_path):
  """Bytes of the tensors themselves are not changed, since safetensors has no checksum of them."""
  model = base("gpt2/tied")
  config = json.loads((GOLDEN / "fused" / CONFIG).read_text())
  content = (GOLDEN / "fused" / WEIGHTS).read_bytes()
  header_size = len(content) - len(header_of(content)[1])
  expected = load_peft(GOLDEN / "fused", model.stored, model.params)[1]
  rng, loaded = random.Random(f"{kind} 1"), 0
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  (tmp_path / CONFIG).write_text(json.dumps(config))
  (tmp_path / WEIGHTS).write_bytes(content)
  for i in range(MUTATIONS):
    if kind == "config":
      (tmp_path / CONFIG).write_bytes(mutated_text(rng, config))
    elif kind == "bytes":
      head = mutated_bytes(rng, content[:header_size])
      (tmp_path / WEIGHTS).write_bytes(head + content[header_size:])
    else:
      change = mutated_header if kind == "header" else mutated_size
      (tmp_path / WEIGHTS).write_bytes(change(rng, content))
    start = time.process_time()
    try:
      lora_config, trainable = load_peft(tmp_path, model.stored, model.params)
    except (ValueError, FileNotFoundError) as error:
      message = str(error)
    else:
      message, loaded = f"{tmp_path}: loaded", loaded + 1
      assert np.isfinite(lora_config.alpha)
      assert jax.tree.map(np.shape, trainable) == jax.tree.map(np.shape, expected)
      if kind != "header":  # in which offsets may name other bytes of the same size
        jax.tree.map(np.testing.assert_array_equal, trainable, expected)
    assert str(tmp_path) in message, f"{kind} {i}: {message}"
    assert len(message) < 5000, f"{kind} {i}"
    assert time.process_time() - start < SECONDS, f"{kind} {i}"
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert grown < MEGABYTES * 1000, f"{grown // 1000} MB more"
  assert kind == "size" or 0 < loaded < MUTATIONS
