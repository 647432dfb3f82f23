"""The Llama family: equal to `transformers`, cached, adapted by LoRA, strict about folders."""

import dataclasses
import functools
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.decoding import BeamConfig, CachedModel, beam_search, from_linen
from lora_jax.models.llama.folder import load_llama, params_shapes, save_llama
from lora_jax.models.llama.model import Llama, LlamaConfig, MixtureConfig, RopeScaling, init_cache
from lora_jax.placement import params_shardings
from lora_jax.training.mesh import make_mesh

from tests import make_llama_golden as golden
from tests.paths import SHARED
from tests.toy_models import randomized, relative_difference

STORIES = SHARED / "data" / "stories260k"
COMPUTATIONS = {
  "unrolled": {},
  "scanned": {"scan_layers": True},
  "scanned_remat": {"scan_layers": True, "remat": "dots_saveable"},
  "remat": {"remat": "nothing_saveable"},
  "xla": {"attention": "xla"},
}


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, *args):
  return Llama(config).apply({"params": params}, *args)


def expected(name):
  arrays = load_file(golden.GOLDEN / f"{name}.safetensors")
  return jnp.asarray(arrays["tokens"]), arrays["logits"]


@pytest.mark.parametrize(
  ("name", "computation"),
  [(name, "unrolled") for name in golden.MODELS]
  + [("llama3", "scanned"), ("llama3", "xla"), ("mixtral", "scanned_remat")]
  + [
    pytest.param(name, computation, marks=pytest.mark.long)
    for name, computation in [
      *(("llama3", "remat"), ("llama3", "scanned_remat")),
      *(("mixtral_fused", "scanned"), ("qwen2_moe", "remat")),
    ]
  ],
)
def test_logits_are_those_of_transformers(name, computation):
  config, params = load_llama(golden.GOLDEN / name, **COMPUTATIONS[computation])
  tokens, logits = expected(name)
  assert np.abs(logits).max() > 3, "logits this small would prove little"
  assert relative_difference(run(config, params, tokens), logits) < 1e-5


@pytest.mark.parametrize("name", golden.MODELS)
def test_folders_go_there_and_back(name, tmp_path):
  config, params = load_llama(golden.GOLDEN / name)
  save_llama(tmp_path / "new", config, params, end_of_text_id=0, max_shard_bytes=20_000)
  reloaded, same = load_llama(tmp_path / "new")
  assert dataclasses.replace(reloaded, head_dim=config.head_dim) == config
  jax.tree.map(np.testing.assert_array_equal, same, params)
  if config.window_layers is not None:
    return  # no scan of layers that differ
  stacked, layers = load_llama(golden.GOLDEN / name, scan_layers=True)
  save_llama(tmp_path / "stacked", stacked, layers)
  jax.tree.map(np.testing.assert_array_equal, load_llama(tmp_path / "stacked")[1], params)
  names = set(load_file(tmp_path / "stacked" / "model.safetensors"))
  if name.endswith("_fused"):  # experts are written separately, as in published models
    assert "model.layers.1.block_sparse_moe.experts.2.w1.weight" in names
  else:
    assert names == set(load_file(golden.GOLDEN / name / "model.safetensors"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.parametrize("name", golden.MODELS)
def test_transformers_reads_our_folders(name, tmp_path):
  transformers = pytest.importorskip("transformers", reason="transformers is not installed")
  config, params = load_llama(golden.GOLDEN / name)
  save_llama(tmp_path / "new", config, params, end_of_text_id=0)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
  assert type(model).__name__ == f"{golden.MODELS[name][0]}ForCausalLM"
  tokens, logits = expected(name)
  assert relative_difference(golden.logits(model, np.asarray(tokens, np.int64)), logits) < 1e-5


@pytest.mark.parametrize(
  ("name", "scan_layers"),
  [
    *(("llama3", False), ("gemma", False), ("qwen2_moe", True)),
    *(
      pytest.param(name, scan_layers, marks=pytest.mark.long)
      for name, scan_layers in [
        *(("llama3", True), ("qwen3", False), ("qwen3", True)),
        *(("gemma", True), ("qwen2_moe", False)),
      ]
    ),
  ],
)
def test_the_cache_gives_what_the_whole_sequence_gives(name, scan_layers):
  config, params = load_llama(golden.GOLDEN / name, scan_layers=scan_layers)
  tokens, logits = expected(name)
  cache, start, collected = init_cache(config, 2, 16), 0, []
  model, variables = Llama(config), {"params": params}
  extend, logits_of = (
    jax.jit(functools.partial(model.apply, method=name)) for name in ("extend", "logits")
  )
  for size in (6, 4, 3):
    place = start + jnp.arange(size, dtype=jnp.int32)
    mask = (jnp.arange(16)[None] <= place[:, None])[None]
    positions = jnp.broadcast_to(place[None], (2, size))
    part = tokens[:, start : start + size]
    hidden, cache = extend(variables, part, positions, cache, start, mask)
    collected.append(logits_of(variables, hidden))
    start += size
  assert relative_difference(jnp.concatenate(collected, axis=1), logits) < 1e-5


@pytest.mark.parametrize("name", ["mistral", "mixtral", "qwen2_mixed"])
def test_packed_rows_and_some_outputs_are_those_of_each_sequence(name):
  config, params = load_llama(golden.GOLDEN / name)
  tokens, _ = expected(name)
  segments = jnp.asarray([[1] * 8 + [2] * 5] * 2)
  positions = jnp.asarray([[*range(8), *range(5)]] * 2)
  alone = [run(config, params, tokens[:, part]) for part in (slice(8), slice(8, 13))]
  pair = jnp.concatenate(alone, axis=1)
  assert relative_difference(run(config, params, tokens, positions, segments), pair) < 1e-5
  token_index = jnp.asarray([[12, 7, 3], [0, 9, 9]])
  hidden = jax.jit(functools.partial(Llama(config).apply, {"params": params}, method="hidden"))
  selected = hidden(tokens, positions, segments, token_index)
  every = hidden(tokens, positions, segments)
  assert (
    relative_difference(selected, jnp.take_along_axis(every, token_index[..., None], axis=1)) < 1e-5
  )


@pytest.mark.parametrize(
  "computation", ["unrolled", pytest.param("scanned", marks=pytest.mark.long)]
)
def test_lora_of_all_linear_layers(computation):
  config, params = load_llama(golden.GOLDEN / "llama3", **COMPUTATIONS[computation])
  tokens, logits = expected("llama3")
  target = r"layers(_\d+)?/(attn|mlp)/\w+/kernel"
  adapted = lj.lora(functools.partial(run, config), lj.LoraConfig(2, 4.0, target))
  trainable = adapted.init(jax.random.key(0), params, tokens)
  apply = jax.jit(adapted.apply)
  assert relative_difference(apply(params, trainable, tokens), logits) < 1e-5
  trainable = randomized(trainable)
  out = apply(params, trainable, tokens)
  assert relative_difference(run(config, adapted.merge(params, trainable), tokens), out) < 1e-5
  assert relative_difference(out, logits) > 0.1
  loss = lambda tune: adapted.apply(params, tune, tokens).var()  # noqa: E731
  gradients = jax.jit(jax.grad(loss))(trainable)
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.long
@pytest.mark.parametrize("computation", ["scanned", "unrolled"])
def test_lora_of_experts(computation):
  """Each expert has its own factors, and so have the router and the shared expert."""
  config, params = load_llama(golden.GOLDEN / "qwen2_moe", **COMPUTATIONS[computation])
  tokens, logits = expected("qwen2_moe")
  target = r"layers(_\d+)?/mlp/(experts/\w+|router/kernel|shared/\w+/kernel)"
  adapted = lj.lora(functools.partial(run, config), lj.LoraConfig(2, 4.0, target))
  trainable = adapted.init(jax.random.key(0), params, tokens)
  layer = trainable["layers" if config.scan_layers else "layers_0"]["mlp"]["experts"]
  stack = (2,) if config.scan_layers else ()
  assert layer["gate"].lora_a.shape == (*stack, 4, 16, 2)
  assert layer["down"].lora_b.shape == (*stack, 4, 2, 16)
  step_0 = jax.jit(adapted.apply)(params, trainable, tokens)
  np.testing.assert_array_equal(step_0, run(config, params, tokens))
  trainable = randomized(trainable)

  def pair(trainable):
    """Returns the outputs of the adapted and of the merged model."""
    merged = adapted.merge(params, trainable)
    return adapted.apply(params, trainable, tokens), run(config, merged, tokens)

  @jax.jit
  def outputs_and_gradients(trainable):
    grads = (jax.grad(lambda tune, i=i: pair(tune)[i].var())(trainable) for i in range(2))
    return pair(trainable), tuple(grads)

  (out, merged), (gradients, same) = outputs_and_gradients(trainable)
  assert relative_difference(merged, out) < 1e-5
  assert relative_difference(gradients, same) < 1e-5
  assert relative_difference(out, logits) > 0.1


def test_decoding_with_an_adapter_of_experts():
  """Greedy decoding with the cache gives the tokens of whole sequences."""
  config, params = load_llama(golden.GOLDEN / "qwen3_moe")
  tokens, _ = expected("qwen3_moe")
  lora_config = lj.LoraConfig(2, 4.0, r".*/experts/\w+")
  adapted = lj.lora(functools.partial(run, config), lora_config)
  trainable = randomized(adapted.init(jax.random.key(0), params, tokens))
  base = from_linen(Llama(config), functools.partial(init_cache, config), config.num_positions)
  extend = lj.lora(base.extend, lora_config).apply
  model = CachedModel(
    lambda pair, *args: extend(*pair, *args),
    lambda pair, hidden: base.logits(pair[0], hidden),
    base.make_cache,
    base.max_positions,
  )
  search = BeamConfig(eos_ids=(0,), num_beams=1, max_new_tokens=8, pad_id=0)
  prompt = [int(token) for token in tokens[0, :5]]
  (ids,) = beam_search(model, (params, trainable), [prompt], search).best()
  row = jnp.asarray([prompt + list(ids)])
  whole = jax.jit(adapted.apply)(params, trainable, row)
  assert list(ids) == whole[0, 4:-1].argmax(axis=-1).tolist()
  assert list(ids) != run(config, params, row)[0, 4:-1].argmax(axis=-1).tolist()


def test_a_mesh_gets_its_shards_while_loading():
  mesh = make_mesh(2, 2, 2)
  rules = (
    (r".*/(query|key|value|gate|up)/kernel", jax.P("fsdp", "tensor")),
    (r".*/(out|down)/kernel", jax.P("tensor", "fsdp")),
    (r".*", jax.P()),
  )
  places = functools.partial(params_shardings, mesh, rules=rules)
  config, params = load_llama(golden.GOLDEN / "llama2", shardings=places)
  kernel = params["layers_1"]["attn"]["query"]["kernel"]
  assert kernel.sharding.spec == jax.P("fsdp", "tensor")
  assert kernel.addressable_shards[0].data.shape == (16, 16)
  tokens, logits = expected("llama2")
  assert relative_difference(run(config, params, tokens), logits) < 1e-5


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_mesh_gets_its_shards_of_experts(scan_layers):
  mesh = make_mesh(2, 2, 2)
  stack = (None,) * scan_layers
  rules = (
    (r".*/experts/(gate|up)", jax.P(*stack, "fsdp", None, "tensor")),
    (r".*/experts/down", jax.P(*stack, "fsdp", "tensor")),
    (r".*", jax.P()),
  )
  places = functools.partial(params_shardings, mesh, rules=rules)
  for name, count in (("mixtral", 4), ("qwen2_moe", 4)):
    config, params = load_llama(golden.GOLDEN / name, shardings=places, scan_layers=scan_layers)
    kernel = params["layers" if scan_layers else "layers_1"]["mlp"]["experts"]["gate"]
    assert kernel.addressable_shards[0].data.shape == (*(2,) * scan_layers, count // 2, 16, 6)
    tokens, logits = expected(name)
    assert relative_difference(run(config, params, tokens), logits) < 1e-5


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("llama2", {"model_type": "falcon"}, "expected model_type llama, mistral, .*got 'falcon'"),
    ("llama2", {"hidden_size": "32"}, "hidden_size must be an integer, got '32'"),
    ("llama2", {"hidden_act": "gelu"}, "hidden_act must be one of silu, .* got 'gelu'"),
    ("llama2", {"head_dim": "8"}, "head_dim must be .*, got '8'"),
    (
      "llama2",
      {"rope_parameters": {"rope_type": "linear"}},
      "linear scaling of the rotation: missing factor",
    ),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not"),
    ("llama2", {"num_key_value_heads": 3}, "num_kv_heads must divide num_heads, got 3 for 4"),
    ("llama2", {"intermediate_size": 48}, r"gate_proj.weight has shape \(56, 32\), expected"),
    ("llama2", {"num_hidden_layers": 1}, "num_hidden_layers is 1 .* the weights have 2 layers"),
    ("llama2", {"num_hidden_layers": 3}, "num_hidden_layers is 3 .* the weights have 2 layers"),
    ("llama2", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
    (
      "llama2",
      {"partial_rotary_factor": 0.5},
      "partial_rotary_factor=0.5 is not supported; expected 1.0",
    ),
    ("mixtral", {"num_experts_per_tok": 5}, "from 1 to num_experts = 4, got 5"),
    ("mixtral", {"num_local_experts": 3}, r"unexpected model.*block_sparse_moe\.experts\.3\.w1"),
    ("mixtral_fused", {"num_local_experts": 4}, r"gate_up_proj has shape \(3, 24, 16\), expected"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "layers with and without experts in one model"),
    ("qwen2_moe", {"decoder_sparse_step": 2}, "layers with and without experts in one model"),
    (
      "qwen3_moe",
      {"moe_intermediate_size": "12"},
      "moe_intermediate_size must be an integer, got '12'",
    ),
    (
      "qwen2_mixed",
      {"layer_types": ["full_attention"]},
      "layer_types must have num_hidden_layers = 2 items",
    ),
  ],
)
def test_folders_that_are_computed_otherwise_are_refused(name, fields, message, tmp_path):
  shutil.copytree(golden.GOLDEN / name, tmp_path / "model")
  path = tmp_path / "model" / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  with pytest.raises(ValueError, match=message):
    load_llama(tmp_path / "model")


def test_a_head_that_is_said_to_be_tied_must_be(tmp_path):
  shutil.copytree(golden.GOLDEN / "llama3", tmp_path / "model")
  path = tmp_path / "model" / "model.safetensors"
  arrays = load_file(path)
  save_file(arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]}, path)
  jax.tree.map(
    np.testing.assert_array_equal,
    load_llama(tmp_path / "model")[1],
    load_llama(golden.GOLDEN / "llama3")[1],
  )
  save_file(arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"] + 1}, path)
  with pytest.raises(
    ValueError, match=r"lm_head\.weight .* differs from model\.embed_tokens\.weight"
  ):
    load_llama(tmp_path / "model")


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_a_sliding_window_that_is_not_written_is_that_of_transformers(name, tmp_path):
  shutil.copytree(golden.GOLDEN / name, tmp_path / "model")
  path = tmp_path / "model" / "config.json"
  fields = json.loads(path.read_text()) | {"use_sliding_window": True, "max_window_layers": 0}
  if name == "qwen2_moe":  # there the first ones slide
    fields["max_window_layers"] = 2
  for key in ("sliding_window", "layer_types"):
    fields.pop(key, None)
  path.write_text(json.dumps(fields))
  assert load_llama(tmp_path / "model")[0].sliding_window == 4096


@pytest.mark.parametrize(
  ("name", "fields", "same"),
  [
    ("llama2", {"num_key_value_heads": None, "head_dim": None}, {}),
    ("llama2", {"use_sliding_window": True, "sliding_window": 3}, {}),
    ("mistral", {"use_sliding_window": False, "layer_types": None}, {}),
    ("mistral", {"sliding_window": None}, {"sliding_window": None}),
    ("qwen2", {"attention_bias": True, "mlp_bias": True}, {}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, {}),
    ("qwen2_mixed", {"layer_types": None}, {}),
    ("qwen2_mixed", {"max_window_layers": 0}, {}),  # layer_types count
    ("qwen3_moe", {"num_experts": 4, "num_local_experts": 4}, {}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 3}, {"sliding_window": 3}),
    ("mixtral", {"rope_parameters": None}, {}),
  ],
)
def test_fields_mean_what_they_do_in_transformers(name, fields, same, tmp_path):
  shutil.copytree(golden.GOLDEN / name, tmp_path / "model")
  path = tmp_path / "model" / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))
  config, expected_config = (
    load_llama(folder)[0] for folder in (tmp_path / "model", golden.GOLDEN / name)
  )
  head_dim = config.head_size
  assert dataclasses.replace(config, head_dim=head_dim) == dataclasses.replace(
    expected_config, head_dim=head_dim, **same
  )


def test_layers_that_differ_are_not_scanned():
  with pytest.raises(ValueError, match="without a sliding window need scan_layers=False"):
    load_llama(golden.GOLDEN / "qwen2_mixed", scan_layers=True)


def test_a_cache_longer_than_the_window_is_refused():
  config, params = load_llama(golden.GOLDEN / "mistral")
  args = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32), init_cache(config, 1, 8), 0
  with pytest.raises(ValueError, match="sliding window is 5 tokens; a cache of 8 slots"):
    Llama(config).apply({"params": params}, *args, jnp.ones((1, 1, 8), bool), method="extend")


PUBLISHED = {  # parameters, from the models' cards
  "Llama 2 7B": (LlamaConfig(), 6_738_415_616),
  "Llama 3.1 8B": (
    LlamaConfig(
      vocab_size=128256,
      num_kv_heads=8,
      mlp_dim=14336,
      num_positions=131072,
      rope_theta=5e5,
      rope_scaling=RopeScaling("llama3", 8.0),
    ),
    8_030_261_248,
  ),
  "Mistral 7B": (LlamaConfig(num_kv_heads=8, mlp_dim=14336, sliding_window=4096), 7_241_732_096),
  "Qwen2 0.5B": (
    LlamaConfig(
      vocab_size=151936,
      embed_dim=896,
      num_layers=24,
      num_heads=14,
      num_kv_heads=2,
      mlp_dim=4864,
      qkv_bias=True,
      tie_head=True,
    ),
    494_032_768,
  ),
  "Mixtral 8x7B": (
    LlamaConfig(num_kv_heads=8, mlp_dim=14336, mixture=MixtureConfig(8, 2)),
    46_702_792_704,
  ),
  "Qwen1.5 MoE A2.7B": (
    LlamaConfig(
      vocab_size=151936,
      embed_dim=2048,
      num_layers=24,
      num_heads=16,
      num_kv_heads=16,
      mlp_dim=1408,
      mixture=MixtureConfig(60, 4, renormalize=False, shared_dim=5632),
      qkv_bias=True,
    ),
    14_315_784_192,
  ),
  "Qwen3 0.6B": (
    LlamaConfig(
      vocab_size=151936,
      embed_dim=1024,
      num_layers=28,
      num_heads=16,
      num_kv_heads=8,
      head_dim=128,
      mlp_dim=3072,
      qk_norm=True,
      tie_head=True,
    ),
    596_049_920,
  ),
  "Qwen3 30B-A3B": (
    LlamaConfig(
      vocab_size=151936,
      embed_dim=2048,
      num_layers=48,
      num_kv_heads=4,
      head_dim=128,
      mlp_dim=768,
      mixture=MixtureConfig(128, 8),
      qk_norm=True,
    ),
    30_532_122_624,
  ),
  "Gemma 2B": (
    LlamaConfig(
      vocab_size=256000,
      embed_dim=2048,
      num_layers=18,
      num_heads=8,
      num_kv_heads=1,
      head_dim=256,
      mlp_dim=16384,
      norm_offset=1.0,
      scale_embedding=True,
      tie_head=True,
    ),
    2_506_172_416,
  ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
  config, count = PUBLISHED[name]
  assert sum(leaf.size for leaf in jax.tree.leaves(params_shapes(config))) == count


def read_stories():
  """Returns the sizes and tensors of llama2.c's file."""
  raw = (STORIES / "stories260K.bin").read_bytes()
  dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", raw[:28])
  values, place, kv = np.frombuffer(raw[28:], np.float32), 0, kv_heads * dim // heads
  shapes = {
    "embed_tokens": (vocab, dim),
    "input_layernorm": (layers, dim),
    "self_attn.q_proj": (layers, dim, dim),
    "self_attn.k_proj": (layers, kv, dim),
    "self_attn.v_proj": (layers, kv, dim),
    "self_attn.o_proj": (layers, dim, dim),
    "post_attention_layernorm": (layers, dim),
    "mlp.gate_proj": (layers, hidden, dim),
    "mlp.down_proj": (layers, dim, hidden),
    "mlp.up_proj": (layers, hidden, dim),
    "norm": (dim,),
  }
  tensors = {}
  for name, shape in shapes.items():
    count = int(np.prod(shape))
    tensors[name] = values[place : place + count].reshape(shape)
    place += count
  return (heads, kv_heads, length), tensors


def stories_folder(folder):
  """Writes them as a Hugging Face folder, where the rotation pairs i with i + H / 2."""
  (heads, kv_heads, length), read = read_stories()
  layers, _, dim = read["self_attn.q_proj"].shape
  tensors = {f"model.{name}.weight": read[name] for name in ("embed_tokens", "norm")}
  for name, stack in read.items():
    if name.endswith(("q_proj", "k_proj")):  # from pairs (2 i, 2 i + 1)
      pairs = stack.reshape(layers, -1, dim // heads // 2, 2, dim)
      stack = pairs.swapaxes(2, 3).reshape(stack.shape)
    if f"model.{name}.weight" not in tensors:
      tensors |= {f"model.layers.{i}.{name}.weight": stack[i] for i in range(layers)}
  folder.mkdir()
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
  config = {
    "model_type": "llama",
    "vocab_size": len(read["embed_tokens"]),
    "hidden_size": dim,
    "intermediate_size": read["mlp.up_proj"].shape[1],
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "max_position_embeddings": length,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
  }
  (folder / "config.json").write_text(json.dumps(config))


def numpy_logits(ids):
  """Returns the last logits by plain numpy in float64, straight from llama2.c's file."""
  (heads, kv_heads, _), w = read_stories()
  x = w["embed_tokens"][ids].astype(np.float64)
  time, dim = x.shape
  size = dim // heads
  angles = np.arange(time)[:, None] / 10000.0 ** (np.arange(0, size, 2) / size)
  turn = np.exp(1j * angles)[:, None]  # of pairs as complex numbers

  def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

  def turned(x):
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([z.real, z.imag], -1).reshape(x.shape)

  for i in range(len(w["input_layernorm"])):
    y = norm(x, w["input_layernorm"][i])
    q, k, v = (
      (y @ w[f"self_attn.{name}_proj"][i].T).reshape(time, -1, size) for name in ("q", "k", "v")
    )
    q, k, v = turned(q), *(np.repeat(z, heads // kv_heads, axis=1) for z in (turned(k), v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(size)
    scores = np.where(np.tri(time, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("nts,snh->tnh", p / p.sum(-1, keepdims=True), v).reshape(time, dim)
    x = x + out @ w["self_attn.o_proj"][i].T
    y = norm(x, w["post_attention_layernorm"][i])
    gate, up = (y @ w[f"mlp.{name}_proj"][i].T for name in ("gate", "up"))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down_proj"][i].T
  return norm(x[-1], w["norm"]) @ w["embed_tokens"].T


def pieces():
  """Returns the tokens' bytes, from llama2.c's file of them."""
  raw, place, collected = (STORIES / "tok512.bin").read_bytes(), 4, []
  while place < len(raw):
    _, length = struct.unpack("fi", raw[place : place + 8])
    collected.append(raw[place + 8 : place + 8 + length])
    place += 8 + length
  return collected


@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260k is not beside this checkout")
def test_a_pretrained_model_tells_a_story(tmp_path):
  """Greedy decoding gives the tokens of a plain NumPy model."""
  stories_folder(tmp_path / "stories")
  config, params = load_llama(tmp_path / "stories")
  model = from_linen(Llama(config), functools.partial(init_cache, config), config.num_positions)
  search = BeamConfig(eos_ids=(1, 2), num_beams=1, max_new_tokens=60, pad_id=0)
  (ids,) = beam_search(model, params, [[1]], search).best()
  text = b"".join(pieces()[i] for i in ids).decode("utf-8")
  assert text.startswith(" Once upon a time, there was a little girl named"), text
  expected = [1]
  for _ in ids:
    expected.append(int(numpy_logits(expected).argmax()))
  assert list(ids) == expected[1:]
