"""DoRA from and to PEFT has the same logits and files, or PEFT has no format for it."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.adapters.delta import adapter_weights, is_lora_weight
from lora_jax.interop import load_peft, save_peft
from lora_jax.models.llama import folder as llama_folder

from tests import make_peft_golden as golden
from tests import parity
from tests.toy_models import relative_difference
from tests.toy_variants import GAIN_OUT

QUERY_VALUE = r"h(_\d+)?/attn/(query|value)/kernel"
FUSED = "base_model.model.transformer.h.{}.attn.c_attn.{}"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@functools.cache
def base(name, scan_layers=False):
  family = parity.family_of(name)
  config, params = family.load(golden.MODELS / name, scan_layers=scan_layers)
  return parity.function(name, config), params, family.stored_tensors(config)


def inputs_of(name):
  return [jnp.asarray(array) for array in parity.inputs_of(name)]


def logits(name, adapter, scan_layers=False):
  """Returns the logits of an adapted model, branch by branch and merged."""
  fn, params, _ = base(name, scan_layers)
  adapted, inputs = lj.lora(fn, adapter[0]), inputs_of(name)
  merged = fn(adapted.merge(params, adapter[1]), *inputs)
  return jax.jit(adapted.apply)(params, adapter[1], *inputs), merged


def random_adapter(name="gpt2/tied", scan_layers=False, **settings):
  """Returns an adapter made here, of q and v by default, with random factors and magnitudes."""
  fn, params, _ = base(name, scan_layers)
  settings = {"rank": 2, "alpha": 6.0, "target": QUERY_VALUE, "variant": lj.DORA} | settings
  config = lj.LoraConfig(**settings)
  trainable = lj.lora(fn, config).init(jax.random.key(0), params, *inputs_of(name))
  draw = np.random.default_rng(0).standard_normal

  def randomized(node):
    if not is_lora_weight(node):
      return node + 0.2 * draw(node.shape)
    trained = {spec.name: node.arrays[spec.name] for spec in node.table if not spec.frozen}
    return node.replace(**{key: x + 0.2 * draw(x.shape) for key, x in trained.items()})

  trainable = jax.tree.map(randomized, trainable, is_leaf=is_lora_weight)
  return config, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), trainable)


def shapes_of(params):
  return jax.eval_shape(lambda: params)


def expected(name):
  return load_file(golden.GOLDEN / f"{name}.safetensors")["logits"]


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", golden.DORA)
def test_logits_and_files_are_pefts(name, scan_layers, tmp_path):
  base_name, _ = golden.DORA[name]
  fn, params, tensors = base(base_name, scan_layers)
  config, trainable = load_peft(golden.GOLDEN / name, tensors, params)
  assert config.variant is lj.DORA
  assert relative_difference(fn(params, *inputs_of(base_name)), expected(name)) > 0.05
  for got in logits(base_name, (config, trainable), scan_layers):
    assert relative_difference(got, expected(name)) < 1e-5
  for node in adapter_weights(trainable).values():
    assert relative_difference(node.magnitude, jnp.sqrt(node.norm_squared)) > 0.1
  save_peft(tmp_path / "new", config, trainable, tensors, params)
  first, second = (
    load_file(folder / WEIGHTS) for folder in (golden.GOLDEN / name, tmp_path / "new")
  )
  assert list(first) == list(second)
  for key, array in first.items():
    np.testing.assert_array_equal(second[key], array)
  assert json.loads((tmp_path / "new" / CONFIG).read_text())["use_dora"] is True


def test_norms_are_those_of_a_new_adapter():
  """They are bit-identical, so that |V| is the same as in training."""
  _, params, tensors = base("gpt2/tied", scan_layers=True)
  _, trainable = load_peft(golden.GOLDEN / "dora_fused", tensors, params)
  initialized = adapter_weights(random_adapter(scan_layers=True)[1])
  loaded = adapter_weights(trainable)
  assert initialized.keys() < loaded.keys()
  for path, node in initialized.items():
    np.testing.assert_array_equal(loaded[path].norm_squared, node.norm_squared)
    assert loaded[path].table == lj.DORA.table


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_both_names_of_the_magnitude_are_read(suffix, tmp_path):
  shutil.copytree(golden.GOLDEN / "dora", tmp_path / "adapter")
  arrays = load_file(tmp_path / "adapter" / WEIGHTS)
  renamed = {f"{k}{suffix}" if k.endswith("vector") else k: x for k, x in arrays.items()}
  save_file(renamed, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
  _, params, tensors = base("llama/llama3")
  adapter = load_peft(tmp_path / "adapter", tensors, params)
  assert relative_difference(logits("llama/llama3", adapter)[0], expected("dora")) < 1e-5
  peft = pytest.importorskip("peft", reason="peft is not installed")
  model = golden.base_model("llama/llama3")
  peer = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
  got = golden.logits(peer, golden.tokens_of("llama/llama3"))
  assert relative_difference(got, expected("dora")) < 1e-5


LLAMA = r"token_embedding/embedding|layers(_\d+)?/(attn/query|mlp/down)/kernel"
CASES = {
  "q and v": ("gpt2/tied", {}),
  "ranks and alphas": (
    "gpt2/tied",
    {"rules": [lj.LoraRule("h_1/attn/value/kernel", rank=3, alpha=1.0)]},
  ),
  "one layer": ("gpt2/tied", {"layers": [1]}),
  "a stack": ("gpt2/tied", {"scan_layers": True}),
  "parts of two stacks": (
    "gpt2/tied",
    {
      "scan_layers": True,
      "rules": [lj.LoraRule(".*/query/kernel", stacked_layers=[1])],
    },
  ),
  "with the last norm": ("gpt2/tied", {"extra": "ln_f/.*"}),
  "an embedding": ("llama/llama_biased", {"target": LLAMA}),
  "a convolution": ("deberta/v2_regression", {"target": "conv/kernel|.*/mlp/up/kernel"}),
}
SHORT = ("ranks and alphas", "a stack", "an embedding", "a convolution")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.parametrize(
  "case",
  [pytest.param(case, marks=() if case in SHORT else (pytest.mark.long,)) for case in CASES],
)
def test_peft_itself_agrees(case, tmp_path):
  name, settings = CASES[case]
  scan_layers = settings.get("scan_layers", False)
  _, params, tensors = base(name, scan_layers)
  adapter = random_adapter(name, **settings)
  save_peft(tmp_path / "new", *adapter, tensors, params)
  reference = logits(name, adapter, scan_layers)[0]
  _, unrolled, tensors = base(name)  # adapted layers of a stack may differ in rank
  back = load_peft(tmp_path / "new", tensors, unrolled)
  assert relative_difference(logits(name, back)[0], reference) < 1e-5
  peft = pytest.importorskip("peft", reason="peft is not installed")
  peer = peft.PeftModel.from_pretrained(golden.base_model(name), tmp_path / "new").eval()
  for model in (peer, peer.merge_and_unload()):
    assert relative_difference(golden.logits(model, *parity.inputs_of(name)), reference) < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
@pytest.mark.parametrize("name", golden.DORA)
def test_peft_reads_its_own_adapters_from_our_files(name, tmp_path):
  peft = pytest.importorskip("peft", reason="peft is not installed")
  base_name, _ = golden.DORA[name]
  _, params, tensors = base(base_name)
  adapter = load_peft(golden.GOLDEN / name, tensors, params)
  save_peft(tmp_path / "new", *adapter, tensors, params)
  peer = peft.PeftModel.from_pretrained(golden.base_model(base_name), tmp_path / "new").eval()
  got = golden.logits(peer, *parity.inputs_of(base_name))
  assert relative_difference(got, expected(name)) < 1e-5


def test_a_part_that_is_not_adapted_has_the_norms_of_its_weight(tmp_path):
  """If q and v of c_attn are adapted, k has zeros in B and |W| as its magnitude."""
  _, params, tensors = base("gpt2/tied")
  save_peft(tmp_path / "new", *random_adapter(), tensors, params)
  arrays = load_file(tmp_path / "new" / WEIGHTS)
  for i in range(2):
    assert arrays[FUSED.format(i, "lora_A.weight")].shape == (4, 32)
    assert not arrays[FUSED.format(i, "lora_B.weight")][32:64].any()
    norm = np.linalg.norm(params[f"h_{i}"]["attn"]["key"]["kernel"], axis=0)
    magnitude = arrays[FUSED.format(i, "lora_magnitude_vector")]
    np.testing.assert_allclose(magnitude[32:64], norm, rtol=1e-6)
    assert relative_difference(magnitude[:32], norm) > 0.1


def test_where_the_base_models_weights_are_needed(tmp_path):
  """Reading DoRA needs them, and writing some parts of a fused weight; else shapes are enough."""
  _, params, tensors = base("gpt2/tied")
  shapes = shapes_of(params)
  message = (
    r"DoRA needs the norms of the base model's weights, and params have only the shape of h_0/at"
  )
  with pytest.raises(ValueError, match=message):
    load_peft(golden.GOLDEN / "dora_fused", tensors, shapes)
  message = r"h_0/attn/key/kernel is a part of transformer\.h\.0\.attn\.c_attn .* not adapted: DoRA"
  with pytest.raises(ValueError, match=message):
    save_peft(tmp_path / "new", *random_adapter(), tensors, shapes)
  assert not list(tmp_path.iterdir())
  adapter = load_peft(golden.GOLDEN / "dora_fused", tensors, params)
  save_peft(tmp_path / "new", *adapter, tensors, shapes)
  assert len(load_file(tmp_path / "new" / WEIGHTS)) == 16


EXPERTS = r".*(/experts/\w+|/attn/query/kernel)"
REFUSED = {
  "LoRA beside DoRA": (
    "gpt2/tied",
    {"rules": [lj.LoraRule("h_1/.*", variant=lj.LORA)]},
    r"one variant for all modules, and h_1/attn/query/kernel, h_1/attn/value/kernel are adapted by",
  ),
  "LoRA beside DoRA in one module": (
    "gpt2/tied",
    {"variant": None, "rules": [lj.LoraRule(".*/value/kernel", variant=lj.DORA)]},
    r"h_0/attn/query/kernel, h_1/attn/query/kernel are adapted by LoRA, the others by DoRA",
  ),
  "another variant": (
    "gpt2/tied",
    {"rules": [lj.LoraRule("h_1/.*/value/kernel", variant=GAIN_OUT)]},
    rf"for LoRA and DoRA, and h_1/attn/value/kernel is adapted by {GAIN_OUT.name}\. lora_jax\.conv",
  ),
  "experts": (
    "llama/mixtral",
    {"target": EXPERTS},
    r"no DoRA of target_parameters, as which it reads model\.layers\.0\.mlp\.experts\.gate_up_proj",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_has_no_format_for(case, tmp_path):
  name, settings, message = REFUSED[case]
  _, params, tensors = base(name)
  with pytest.raises(ValueError, match=message):
    save_peft(tmp_path / "new", *random_adapter(name, **settings), tensors, params)
  assert not list(tmp_path.iterdir())


def test_more_refusals(tmp_path):
  _, params, tensors = base("gpt2/tied")
  with pytest.raises(ValueError, match=r"servers read no DoRA: .*lora_jax\.convert.*save_merged"):
    save_peft(tmp_path / "new", *random_adapter(), tensors, params, for_server=True)
  config = lj.LoraConfig(rank=2, alpha=6.0, target=QUERY_VALUE)
  with pytest.raises(ValueError, match=r"query/kernel is DoRA .*variant=\.\.\."):
    save_peft(tmp_path / "new", config, random_adapter()[1], tensors, params)
  with pytest.raises(ValueError, match=r"wte is the head too"):
    save_peft(tmp_path / "new", *random_adapter(target="wte/embedding"), tensors, params)
  name = "llama/mixtral"
  config, params = llama_folder.load_llama(golden.MODELS / name)
  published = llama_folder.stored_tensors(config, published=True)
  with pytest.raises(ValueError, match=r"no DoRA of .*block_sparse_moe\.experts\.0\.w1"):
    save_peft(tmp_path / "new", *random_adapter(name, target=EXPERTS), published, params)
  assert not list(tmp_path.iterdir())


def test_files_that_do_not_fit_are_refused(tmp_path):
  shutil.copytree(golden.GOLDEN / "dora_conv", tmp_path / "adapter")
  weights, config = tmp_path / "adapter" / WEIGHTS, tmp_path / "adapter" / CONFIG
  arrays, fields = load_file(weights), json.loads(config.read_text())
  _, params, tensors = base("deberta/v2_regression")
  key = "base_model.model.deberta.encoder.conv.conv.lora_magnitude_vector"
  save_file(arrays | {key: arrays[key].reshape(-1)}, weights)
  with pytest.raises(
    ValueError, match=r"magnitude_vector has shape \(16,\), expected \(1, 16, 1\)"
  ):
    load_peft(tmp_path / "adapter", tensors, params)
  save_file({name: array for name, array in arrays.items() if name != key}, weights)
  with pytest.raises(ValueError, match=rf"missing {key} \(1, 16, 1\)"):
    load_peft(tmp_path / "adapter", tensors, params)
  save_file(arrays, weights)
  config.write_text(json.dumps(fields | {"use_dora": False}))
  with pytest.raises(
    ValueError, match=r"unexpected .*pooler\.dense\.lora_magnitude_vector \(16,\)"
  ):
    load_peft(tmp_path / "adapter", tensors, params)


@pytest.mark.long
@pytest.mark.parametrize("scan_layers", [True, False])
def test_dora_of_published_experts_is_read(scan_layers, tmp_path):
  """Older versions of PEFT wrote a module per expert: m_i / |V_i| of each expert i."""
  name = "llama/mixtral"
  config, params = llama_folder.load_llama(golden.MODELS / name, scan_layers=scan_layers)
  tensors = llama_folder.stored_tensors(config, published=True)
  plain = random_adapter(name, scan_layers, variant=None, target=EXPERTS)
  save_peft(tmp_path / "new", *plain, tensors, params)
  arrays = load_file(tmp_path / "new" / WEIGHTS)
  draw = np.random.default_rng(1).uniform
  magnitudes = {
    key.replace("lora_B.weight", "lora_magnitude_vector"): draw(1, 3, len(b)).astype(np.float32)
    for key, b in arrays.items()
    if "lora_B" in key
  }
  save_file(arrays | magnitudes, tmp_path / "new" / WEIGHTS)
  fields = json.loads((tmp_path / "new" / CONFIG).read_text())
  (tmp_path / "new" / CONFIG).write_text(json.dumps(fields | {"use_dora": True}))
  adapter = load_peft(tmp_path / "new", tensors, params)
  fn = base(name, scan_layers)[0]
  got = lj.lora(fn, adapter[0]).merge(params, adapter[1])
  v = lj.lora(fn, plain[0]).merge(params, plain[1])  # W + scaling * A B
  for layer in range(2):
    whole, of_v = (
      np.asarray(tree["layers"]["mlp"]["experts"]["up"][layer])
      if scan_layers
      else np.asarray(tree[f"layers_{layer}"]["mlp"]["experts"]["up"])
      for tree in (got, v)
    )
    for i, matrix in enumerate(of_v):
      prefix = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{i}.w3"
      gain = magnitudes[f"{prefix}.lora_magnitude_vector"] / np.linalg.norm(matrix, axis=0)
      np.testing.assert_allclose(whole[i], matrix * gain, rtol=1e-5, atol=1e-6)
  assert relative_difference(*(logits(name, adapter, scan_layers))) < 1e-5
