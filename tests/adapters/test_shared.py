"""Arrays that all adapted weights share: one copy in the tree, a part of it for each weight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.adapters.delta import largest_site
from lora_jax.training.checkpoint import restore_adapter, save_adapter
from lora_jax.training.held import read_held, write_held
from lora_jax.training.mesh import make_mesh
from lora_jax.training.step import start, trainable_tree
from lora_jax.trees import leaves_with_path

from tests import toy_variants as toys
from tests.toy_models import make_params, randomized, relative_difference, scanned, tokens

KEY = jax.random.key(0)
WORDS = {"core": "batch rank rank2"}
SHARED = {"a": "in rank", "b": "rank2 out"}


def _start(key, site):
  return toys.draw(key, site, WORDS, rank2=site.rank)


def _start_shared(key, sites):
  site = largest_site(sites)
  return toys.draw(key, site, SHARED, rank2=site.rank)


def variant(**changes):
  """W + A C B, with a core C of each weight, and A and B trained and shared."""
  settings = {
    "name": "shared pair",
    "arrays": WORDS,
    "start": _start,
    "weight": lambda w, p, s: w + s * (p.a.sum_over(p.core, (-1,)) @ p.b),
    "sizes": lambda site: {"rank2": site.rank},
    "shared": lj.Shared(SHARED, _start_shared),
  }
  return lj.Variant(**settings | changes)


VARIANT = variant()
CONFIG = lj.LoraConfig(2, 2.0, ".*", variant=VARIANT)


def two_layers(params, x):
  h = jnp.tanh(x @ params["up"])
  return jnp.einsum("bi,ihd->bhd", h, params["heads"])


def example():
  draw = np.random.default_rng(0)
  shapes = {"up": (6, 8), "heads": (8, 2, 5)}
  params = {k: jnp.asarray(draw.standard_normal(s), jnp.float32) for k, s in shapes.items()}
  return params, jnp.asarray(draw.standard_normal((3, 6)), jnp.float32)


def test_each_weight_gets_its_part_and_gradients_are_summed():
  params, x = example()
  lora = lj.lora(two_layers, CONFIG)
  trainable = lora.init(KEY, params, x)
  node = trainable["lora_shared"]["shared pair"]
  assert {name: array.shape for name, array in node.arrays.items()} == {"a": (8, 2), "b": (2, 10)}

  def written_out(trainable):
    cores = {name: trainable[name].core for name in params}
    shared = trainable["lora_shared"]["shared pair"]
    up = params["up"] + shared.a[:6] @ cores["up"] @ shared.b[:, :8]
    heads = shared.a @ cores["heads"] @ shared.b
    return two_layers({"up": up, "heads": params["heads"] + heads.reshape(8, 2, 5)}, x)

  losses = [
    lambda t: jnp.sum(jnp.sin(lora.apply(params, t, x))),
    lambda t: jnp.sum(jnp.sin(two_layers(lora.merge(params, t), x))),
    lambda t: jnp.sum(jnp.sin(written_out(t))),
  ]
  gradients = jax.jit(lambda t: [jax.grad(loss)(t) for loss in losses])
  got, merged, expected = gradients(trainable)
  assert relative_difference(got, expected) < 1e-5
  assert relative_difference(merged, expected) < 1e-5


def test_ranks_may_differ_and_other_variants_stand_beside():
  params, x = example()
  other = lj.LoraConfig(2, 2.0, ".*", rules=[lj.LoraRule("heads", rank=3)], variant=VARIANT)
  lora = lj.lora(two_layers, other)
  trainable = lora.init(KEY, params, x)
  assert trainable["lora_shared"]["shared pair"].a.shape == (8, 3)
  merged = lora.merge(params, trainable)["up"]
  node = trainable["lora_shared"]["shared pair"]
  delta = node.a[:6, :2] @ trainable["up"].core @ node.b[:2, :8]
  np.testing.assert_allclose(merged - params["up"], delta, atol=1e-6)

  second = variant(name="another shared pair")
  rules = [lj.LoraRule("heads", variant=second)]
  lora = lj.lora(two_layers, lj.LoraConfig(2, 2.0, ".*", rules=rules, variant=VARIANT))
  trainable = lora.init(KEY, params, x)
  shapes = {name: node.a.shape for name, node in trainable["lora_shared"].items()}
  assert shapes == {"shared pair": (6, 2), "another shared pair": (8, 2)}
  out = lora.apply(params, trainable, x)
  assert relative_difference(out, two_layers(lora.merge(params, trainable), x)) < 1e-5


@pytest.mark.parametrize("layers", [None, (2, 0)])
def test_layers_of_a_stack_share(layers):
  params = make_params(stacked=True)
  config = lj.LoraConfig(
    2, 2.0, "blocks/.*/(query|up)/kernel", stacked_layers=layers, variant=VARIANT
  )
  lora = lj.lora(scanned, config)
  trainable = randomized(lora.init(KEY, params, tokens()))
  assert trainable["lora_shared"]["shared pair"].a.shape == (24, 2)
  merged = lora.merge(params, trainable)
  assert (
    relative_difference(lora.apply(params, trainable, tokens()), scanned(merged, tokens())) < 2e-5
  )
  kernel = params["blocks"]["attn"]["query"]["kernel"]
  changed = jnp.abs(merged["blocks"]["attn"]["query"]["kernel"] - kernel).max((1, 2)) > 0
  assert changed.tolist() == [layers is None or i in layers for i in range(3)]


def test_they_are_stored_and_restored_once(tmp_path):
  params, x = example()
  lora = lj.lora(two_layers, CONFIG)
  trainable = lora.init(KEY, params, x)
  arrays, axes = lj.pack(trainable)
  assert sorted(arrays) == [
    "heads/core", "lora_shared/shared pair/a", "lora_shared/shared pair/b", "up/core"
  ]  # fmt: skip
  save_adapter(tmp_path / "adapter", trainable)
  for got in (
    lj.unpack(arrays, axes, like=trainable),
    restore_adapter(tmp_path / "adapter", trainable),
  ):
    assert jax.tree.structure(got) == jax.tree.structure(trainable)
    jax.tree.map(np.testing.assert_array_equal, got, trainable)


def test_a_step_donates_them_and_trains_them_once():
  params, x = example()
  frozen = variant(frozen=("a",))
  lora = lj.lora(two_layers, lj.LoraConfig(2, 2.0, ".*", variant=frozen))
  trainable = lora.init(KEY, params, x)
  state, held, optimizer = start(params, trainable, optax.adam(0.1), KEY, make_mesh())
  assert len(jax.tree.leaves(state.part)) == 3  # two cores and b
  before = jax.tree.map(np.asarray, trainable)

  def step(state, held):
    def loss(part):
      tree = lj.combine(part, held)
      return jnp.sum(lora.apply(tree["base"], tree["adapter"], x) ** 2)

    updates, opt = optimizer.update(jax.grad(loss)(state.part), state.opt_state, state.part)
    return state.replace(part=optax.apply_updates(state.part, updates), opt_state=opt)

  after = trainable_tree(jax.jit(step, donate_argnums=0)(state, held), held)
  moved = {
    path: bool((np.asarray(array) != dict(leaves_with_path(before))[path]).any())
    for path, array in leaves_with_path(after)
  }
  assert moved.pop("lora_shared/shared pair/a") is False
  assert all(moved.values())


def test_frozen_ones_are_written_once_and_read_by_a_resumed_run(tmp_path):
  params, x = example()
  config = lj.LoraConfig(2, 2.0, ".*", variant=variant(frozen=("a", "b")))
  first, second = (
    lj.lora(two_layers, config).init(jax.random.key(seed), params, x) for seed in (0, 1)
  )
  held = [
    lj.partition(tree, lj.trainable_mask({"base": None, "adapter": tree})["adapter"])[1]
    for tree in (first, second)
  ]
  assert len(jax.tree.leaves(held[0])) == 2
  write_held(tmp_path, held[0])
  jax.tree.map(np.testing.assert_array_equal, read_held(tmp_path, held[1]), held[0])


def test_they_are_replicated():
  params, x = example()
  trainable = jax.eval_shape(lj.lora(two_layers, CONFIG).init, KEY, params, x)
  specs = lj.shardings(trainable, {"up": P("fsdp", "tensor"), "heads": P("fsdp", None, None)})
  assert specs["lora_shared"]["shared pair"].arrays == {"a": P(), "b": P()}
  mesh = jax.make_mesh((2,), ("fsdp",))
  places = {"up": NamedSharding(mesh, P("fsdp")), "heads": NamedSharding(mesh, P("fsdp"))}
  placed = lj.lora(two_layers, CONFIG).init(KEY, jax.device_put(params, places), x)
  assert placed["lora_shared"]["shared pair"].a.sharding == NamedSharding(mesh, P())
  named = lj.shardings(trainable, places)
  assert named["lora_shared"]["shared pair"].a == NamedSharding(mesh, P())


def test_the_summary_counts_trained_ones():
  params, x = example()
  trainable = lj.lora(two_layers, CONFIG).init(KEY, params, x)
  rows = [line.split() for line in lj.summary(params, trainable, CONFIG).splitlines()]
  counts = {row[0]: row[-2] for row in rows}
  assert counts["lora_shared/shared"] == "36"
  assert counts["adapter"] == "44"
  frozen = lj.LoraConfig(2, 2.0, ".*", variant=variant(frozen=("a", "b")))
  trainable = lj.lora(two_layers, frozen).init(KEY, params, x)
  assert "lora_shared" not in lj.summary(params, trainable, frozen)


def refused(trainable, config=CONFIG):
  params, x = example()
  with pytest.raises(ValueError, match="not for these params and this config") as error:
    lj.lora(two_layers, config).apply(params, trainable, x)
  return str(error.value)


def test_a_tree_without_them_or_with_others_is_refused():
  params, x = example()
  trainable = lj.lora(two_layers, CONFIG).init(KEY, params, x)
  alone = {name: trainable[name] for name in params}
  assert "missing: lora_shared/shared pair" in refused(alone)
  node = trainable["lora_shared"]["shared pair"]
  small = alone | {"lora_shared": {"shared pair": node.replace(a=node.a[:6], b=node.b[:, :8])}}
  assert "lora_shared/shared pair/a is (6, 2), expected (8, 2)" in refused(small)
  thin = alone | {"lora_shared": {"shared pair": node.replace(a=node.a[:, :1], b=node.b)}}
  assert "lora_shared/shared pair has rank 1, expected 2" in refused(thin)
  wrong = lj.lora(two_layers, lj.LoraConfig(2, 2.0, ".*", variant=variant(frozen=("a",))))
  assert "other variant: lora_shared/shared pair" in refused(wrong.init(KEY, params, x))
  plain = lj.lora(two_layers, lj.LoraConfig(2, 2.0, ".*")).init(KEY, params, x)
  extra = plain | {"lora_shared": trainable["lora_shared"]}
  message = refused(extra, lj.LoraConfig(2, 2.0, ".*"))
  assert "unexpected: lora_shared/shared pair" in message


def test_params_may_not_have_their_key():
  fn = lambda p, x: x @ p["lora_shared"]["w"]  # noqa: E731
  with pytest.raises(ValueError, match="params have a leaf 'lora_shared/w', and the key"):
    lj.lora(fn, CONFIG).init(KEY, {"lora_shared": {"w": jnp.ones((3, 3))}}, jnp.ones((1, 3)))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"shared": SHARED}, r"shared must be a Shared\(arrays, start\), got"),
    ({"shared": lj.Shared({"a": "batch rank"}, _start_shared)}, "unknown axes batch; expected in"),
    ({"shared": lj.Shared(WORDS | {"core": "rank"}, _start_shared)}, "has core in its arrays and"),
    ({"shared": lj.Shared(SHARED, 3)}, "shared.start must be a function, got 3"),
    ({"name": "a/b"}, "a '/' in its name"),
    ({"frozen": ("a", "b", "core")}, "no array that is trained"),
    ({"frozen": ("d",)}, "must be a collection of names of its arrays, a, b, core"),
  ],
)
def test_unusable_ones_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    lj.LoraConfig(2, 2.0, ".*", variant=variant(**changes))


def test_starts_are_checked():
  params, x = example()
  for start_shared, message in (
    (lambda key, sites: {"a": jnp.ones((8, 2))}, r"lora_shared/shared pair: start of .* gave a"),
    (
      lambda key, sites: {"a": jnp.ones((7, 2)), "b": jnp.ones((2, 10))},
      r"lora_shared/shared pair: init gave a \(7, 2\), expected \(8, 2\)",
    ),
  ):
    config = lj.LoraConfig(2, 2.0, ".*", variant=variant(shared=lj.Shared(SHARED, start_shared)))
    with pytest.raises(ValueError, match=message):
      lj.lora(two_layers, config).init(KEY, params, x)
  rules = [lj.LoraRule("heads", variant=variant(frozen=("a",)))]
  config = lj.LoraConfig(2, 2.0, ".*", rules=rules, variant=VARIANT)
  with pytest.raises(ValueError, match="two variants with shared arrays have the name 'shared"):
    lj.lora(two_layers, config).init(KEY, params, x)
