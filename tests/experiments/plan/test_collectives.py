"""Bytes sent in collectives, and how often loops run, before XLA has counted that."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.harness.flops import compiled_flops
from experiments.plan.collectives import collective_bytes
from experiments.plan.step import compile_step
from lora_jax.training.mesh import make_mesh

LOOP = """
%body (p.1: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p.1 = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%p.1), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %next.1 = s32[] add(%next, %one)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[4,4]{1,0} all-reduce(%y), replica_groups={{0,2},{1,3}}
  ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%next.1, %z)
}

%cond (p.2: (s32[], f32[4,4])) -> pred[] {
  %p.2 = (s32[], f32[4,4]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %limit = s32[] constant(9)
  ROOT %lt = pred[] compare(%i.2, %limit), direction=LT
}

ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %w = (s32[], f32[4,4]{1,0}) while(%t0), condition=%cond, body=%body
}
"""


def test_the_trips_of_a_loop_are_its_limit_over_its_step():
  assert compiled_flops(LOOP) == 5 * 2 * 4**3
  assert collective_bytes(LOOP) == {"all-reduce": 5 * 64 * 2 / 2}


def test_an_element_of_a_tuple_may_have_no_instruction_of_its_own():
  lines = [line for line in LOOP.splitlines() if "get-tuple-element" not in line]
  for element, operand in (("%i.2", "%p.2#0"), ("%i", "%p.1#0"), ("%x", "%p.1#1")):
    lines = [line.replace(element, operand) for line in lines]
  assert compiled_flops("\n".join(lines)) == compiled_flops(LOOP)


@pytest.mark.parametrize(
  ("written", "other"),
  [
    ("direction=LT", "direction=NE"),
    ("constant(9)", "parameter(1)"),
    ("add(%i, %one)", "multiply(%i, %one)"),
    ("tuple(%next.1, %z)", "tuple(%i, %z)"),
  ],
)
def test_a_loop_that_does_not_count_is_refused(written, other):
  assert written in LOOP
  with pytest.raises(ValueError, match="a loop with matmuls has no known trip count"):
    compiled_flops(LOOP.replace(written, other))


@pytest.mark.parametrize(
  ("line", "sent"),
  [
    ("bf16[8,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", 64 * 3 / 4),
    ("f32[2,4]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, dimensions={0}", 32 * 3),
    (
      "(f32[4]{0}, u8[6]{0}) all-reduce(%x, %y), replica_groups=mesh['axis_0'=4,'axis_1'=2], "
      "device_ids=([8]) {'axis_0'}",
      22 * 2 * 3 / 4,
    ),
    (
      "pred[16]{0} all-to-all(%x), replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}, dimensions={0}",
      16 * 3 / 4,
    ),
    ("s4[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 8),
  ],
)
def test_a_device_sends_its_share_around_the_ring(line, sent):
  text = f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  %c = {line}\n}}\n"
  assert sum(collective_bytes(text).values()) == sent


def test_a_collective_without_groups_is_refused():
  text = "ENTRY %main (x: f32[4]) -> f32[4] {\n  %c = f32[4]{0} all-reduce(%x)\n}\n"
  with pytest.raises(ValueError, match="a collective without known groups"):
    collective_bytes(text)


def test_a_program_that_was_compiled_before_is_read_too(tmp_path):
  """JAX's persistent cache, which many machines have, would leave nothing to read."""
  settings = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": str(tmp_path / "cache"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(make_mesh(4), P("data")))
  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    texts = [
      compile_step(jax.jit(lambda x: x @ x.T).lower(x), tmp_path / folder).text
      for folder in ("first", "second")
    ]
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
  assert compiled_flops(texts[0]) == compiled_flops(texts[1]) > 0


def test_collectives_of_a_compiled_scan(tmp_path):
  mesh = make_mesh(1, 4, 2)
  x, w = (
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    for shape, spec in (((8, 16), P(None, "fsdp")), ((5, 16, 16), P(None, "fsdp", None)))
  )

  def fn(x, w):
    def layer(x, w):
      return jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P())), None

    return jax.lax.scan(layer, jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P())), w)[0]

  text = compile_step(jax.jit(fn).lower(x, w), tmp_path).text
  assert compiled_flops(text) == 5 * 2 * 8 * 16 * 16 / 4
  assert collective_bytes(text) == {
    "all-gather": 8 * 16 * 4 * 3 / 4,
    "all-reduce": 5 * 2 * 8 * 16 * 4 * 3 / 4,
  }
