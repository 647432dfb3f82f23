"""A batch whose rows use different adapters decodes each prompt as its adapter alone does."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.decoding import (
  BeamConfig,
  SamplingConfig,
  adapted,
  adapted_by_row,
  beam_search,
  from_linen,
  generate,
)
from lora_jax.decoding.sampling import _generate
from lora_jax.models.gpt2.folder import load_gpt2, params_shapes
from lora_jax.models.gpt2.model import GPT2, init_cache

from tests.docs.pages import code_blocks, page
from tests.jaxprs import equations
from tests.paths import GOLDEN
from tests.toy_models import randomized

FOLDER = GOLDEN / "beam"
PROMPTS = json.loads((FOLDER / "golden.json").read_text())["prompts"][:6]
SLOTS = [2, 0, 1, 2, 3, 0]
NUM_SLOTS = 5
ALL, QV = r".*/kernel", r".*/(query|value)/kernel"


def cached(config):
  return from_linen(GPT2(config), functools.partial(init_cache, config), config.num_positions)


def method(config):
  return functools.partial(lj.lora, config=config)


def adapter_of(model, params, seed, **settings):
  """Returns an adapter with random factors, large enough that texts change."""
  config = lj.LoraConfig(**{"rank": 2, "alpha": 4.0, "target": ALL} | settings)
  tokens = jnp.ones((1, 1), jnp.int32)
  call = tokens, tokens, model.make_cache(1, 1), 0, jnp.ones((1, 1, 1), bool)
  init = lj.lora(model.extend, config).init
  return config, randomized(jax.eval_shape(init, jax.random.key(0), params, *call), seed=seed)


@pytest.fixture(scope="module")
def case():
  """Returns a model, its params, adapters of other ranks and targets, and their bank."""
  config, params = load_gpt2(FOLDER)
  model = cached(config)
  adapters = [
    adapter_of(model, params, 0),
    adapter_of(model, params, 1, rank=4, target=QV),
    adapter_of(model, params, 2, alpha=-3.0),
  ]
  return model, params, adapters, lj.bank(adapters, params, slots=NUM_SLOTS)


@pytest.fixture(scope="module")
def by_row(case):
  return adapted_by_row(case[0], method(case[3].config))


@pytest.fixture(scope="module")
def alone(case):
  """Returns a function that decodes each prompt by the adapter of its slot, one slot at a time."""
  model, params, _, bank = case
  single = adapted(model, method(bank.config))

  def decode(search):
    texts = {}
    for slot in set(SLOTS):
      texts[slot] = search(single, {"base": params, "adapter": bank.adapter(slot)[1]})
    return [texts[slot][i] for i, slot in enumerate(SLOTS)]

  return decode


def bank_params(case):
  return {"base": case[1], "bank": case[3]}


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.long), 1.5])
def test_each_prompt_is_decoded_by_its_own_adapter(case, by_row, alone, temperature):
  config = SamplingConfig((0,), temperature=temperature, max_new_tokens=8)

  def search(model, params, **options):
    return generate(model, params, PROMPTS, config, jax.random.key(3), **options)

  mixed = search(by_row, bank_params(case), bank_slots=SLOTS, batch_size=3)
  assert mixed == alone(search)
  assert len({tuple(ids) for ids in mixed}) > 3


def test_each_prompts_beams_use_its_own_adapter(case, by_row, alone):
  config = BeamConfig((0,), num_beams=3, max_new_tokens=4)

  def search(model, params, **slots):
    return beam_search(model, params, PROMPTS, config, **slots).best()

  assert search(by_row, bank_params(case), bank_slots=SLOTS) == alone(search)


def test_the_pages_example_replaces_an_adapter_without_compiling(case):
  model, params, (one, other, _), _ = case
  block = next(block for block in code_blocks(page("serving")) if "lj.bank" in block)
  names = {"model": model, "params": params, "one": one, "other": other, "prompts": PROMPTS[:4]}
  jitted: Any = _generate
  compiled = jitted._cache_size()
  exec(block, names)
  assert jitted._cache_size() == compiled + 1
  before, after = names["before"], names["after"]
  assert after[:3] == before[:3]
  assert after[3] != before[3]  # an empty slot
  single = {"base": params, "bank": names["bank"].replace(0, other, params)}
  first = generate(
    names["decoder"], single, PROMPTS[:4], names["settings"], bank_slots=[1, 0, 1, 0]
  )
  assert first[3] == after[3]


@pytest.mark.parametrize(("scanned", "quantized"), [(False, False), (True, True)])
def test_only_the_adapters_of_the_rows_enter_the_loop_and_the_base_is_not_batched(
  case, scanned, quantized
):
  config = dataclasses.replace(load_gpt2(FOLDER)[0], scan_layers=scanned)
  model, params = cached(config), params_shapes(config)
  if quantized:
    params = jax.eval_shape(functools.partial(lj.quantize, format="int8", target=ALL), params)
  adapter = adapter_of(model, params, 0)
  bank = lj.bank([adapter], params, slots=NUM_SLOTS)
  by_row = adapted_by_row(model, method(bank.config))
  rows = jax.ShapeDtypeStruct((7,), "int32")
  tokens = jax.ShapeDtypeStruct((7, 3), "int32")
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 7))
  search = SamplingConfig((0,), temperature=0, max_new_tokens=8)
  traced = jax.make_jaxpr(_generate, static_argnums=(0, 1))(
    by_row, search, {"base": params, "bank": bank}, tokens, rows, keys, rows
  )
  (loop,) = (e for e in equations(traced) if e.primitive.name == "while" and len(e.invars) > 9)
  assert not [v for v in loop.invars if v.aval.shape[:1] == (NUM_SLOTS,)]
  dots = [e for e in equations(traced) if e.primitive.name == "dot_general"]
  kernels = {(48, 48), (48, 192), (192, 48)}
  base = [e for e in dots if e.invars[1].aval.shape in kernels]
  assert base
  assert all(e.outvars[0].aval.shape[0] == 7 for e in base)
  assert not [e for e in equations(traced) if e.primitive.name.startswith("scatter")]
