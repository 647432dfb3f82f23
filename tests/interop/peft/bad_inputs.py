"""Bad adapters of PEFT's methods other than LoRA, and adapters that PEFT has no format for."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.adapters.delta import LoraWeight, Site
from lora_jax.adapters.initializers import kaiming_uniform
from lora_jax.axes import LoraAxes
from lora_jax.interop import load_peft, load_peft_prompt, save_peft, save_peft_prompt
from lora_jax.models.bert.folder import load_bert
from lora_jax.models.bert.folder import stored_tensors as bert_tensors
from lora_jax.models.llama.folder import stored_tensors
from lora_jax.models.zoo import load_causal_lm
from lora_jax.trees import nest, weights_with_path

from tests.bad_inputs import BadInput
from tests.make_peft_golden import MODELS
from tests.make_peft_variants_golden import ADAPTERS, GOLDEN, GPT2, LLAMA
from tests.make_prefix_golden import GOLDEN as PROMPTS

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.model.layers.0."
QUERY = f"{LAYER}self_attn.q_proj"
QUERY_KERNEL, VALUE, DOWN = (
  f"layers_0/{name}/kernel" for name in ("attn/query", "attn/value", "mlp/down")
)
WTE = "base_model.model.transformer.wte.trainable_tokens_delta"

base = functools.cache(lambda name: load_causal_lm(MODELS / name))
golden_arrays = functools.cache(lambda name: load_file(GOLDEN / name / FILE))
golden_config = functools.cache(lambda name: json.loads((GOLDEN / name / CONFIG).read_text()))


def of_file(name, words, adapter, change=dict, shapes_only=False, model=None, **fields):
  """Returns the row of a golden adapter with other tensors or fields, or for another model."""

  def call(folder):
    loaded = base(model or ADAPTERS[adapter][0])
    params = jax.eval_shape(lambda: loaded.params) if shapes_only else loaded.params
    (folder / CONFIG).write_text(json.dumps(golden_config(adapter) | fields))
    arrays = change(dict(golden_arrays(adapter)))
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, folder / FILE)
    return load_peft(folder, loaded.stored, params)

  return BadInput(f"file: {name}", call, words)


def of_other_inputs(folder):
  """Reads what we write of MiSS, whose tensors lack the inputs, for a model with more of them."""
  loaded = base(LLAMA)
  adapter = load_peft(GOLDEN / "miss", loaded.stored, loaded.params)
  save_peft(folder / "new", *adapter, loaded.stored, loaded.params)
  leaves = jax.eval_shape(lambda: dict(weights_with_path(loaded.params)))
  inputs, outputs = leaves[DOWN].shape
  leaves[DOWN] = jax.ShapeDtypeStruct((inputs + 8, outputs), "float32")
  params = nest((tuple(path.split("/")), leaf) for path, leaf in leaves.items())
  return load_peft(folder / "new", loaded.stored, params)


def of_gemma(action):
  """Reads or writes HiRA of Gemma's embedding, with a head of its own."""

  def call(folder):
    loaded = base("llama/gemma")
    config = dataclasses.replace(loaded.module.config, tie_head=False)
    rows = loaded.params["token_embedding"]["embedding"]
    params = {**loaded.params, "lm_head": {"kernel": rows.T}}
    if action == "save":
      node = zeros("token_embedding/embedding", rows, lj.HIRA, 2)
      lora = lj.LoraConfig(2, 2.0, target=".*embedding", variant=lj.HIRA)
      tree = {"token_embedding": {"embedding": node}}
      return save_peft(folder / "new", lora, tree, stored_tensors(config), params)
    fields = {"peft_type": "HIRA", "r": 2, "target_modules": ["embed_tokens"]}
    (folder / CONFIG).write_text(json.dumps(fields))
    return load_peft(folder, stored_tensors(config), params)

  words = ("model.embed_tokens: the model multiplies", "until it is merged", "LoRA")
  return BadInput(f"{action}: HiRA of Gemma's embedding", call, words)


def without(name):
  return lambda arrays: {key: array for key, array in arrays.items() if key != name}


def others(arrays):
  del arrays
  return dict(golden_arrays("loha"))


def renamed(name):
  """Gives LoHa's first factor the name of another method's tensor."""
  return lambda arrays: {name if "hada_w1_a" in key else key: x for key, x in arrays.items()}


def changed(name, change):
  return lambda arrays: arrays | {name: change(arrays[name])}


def of_save(name, words, model, variants, extra=(), for_server=False, rank=2, **changes):
  """Returns the row of an adapter of zeros that is written, of weights by path or expression.

  Args:
    name: of the row.
    words: of the message.
    model: the small model.
    variants: by expression, the variant, or it and its rank.
    extra: expressions of fully trained leaves.
    for_server: as `save_peft` has it.
    rank: of the others.
    changes: new values of arrays that all weights have.
  """

  def call(folder):
    loaded = base(model)
    config = lj.LoraConfig(
      rank,
      4.0,
      target=list(variants),
      rules=[
        lj.LoraRule(pattern, variant=variant, **({"rank": ranks[0]} if ranks else {}))
        for pattern, (variant, *ranks) in variants.items()
      ],
      extra=extra,
    )
    items = []
    for path, leaf in weights_with_path(loaded.params):
      for pattern, (variant, *ranks) in variants.items():
        if re.fullmatch(pattern, path):
          node = zeros(path, leaf, variant, ranks[0] if ranks else rank)
          items.append((tuple(path.split("/")), node.replace(**changes)))
          if variant.shared:
            sizes = {"vera_in": (leaf.shape[0], rank), "vera_out": (rank, leaf.shape[1])}
            shared = {key: np.zeros(size, np.float32) for key, size in sizes.items()}
            node = LoraWeight.from_arrays(shared, variant.shared_table, node.axes, None)
            items.append((("lora_shared", variant.name), node))
      if any(re.fullmatch(pattern, path) for pattern in extra):
        items.append((tuple(path.split("/")), np.zeros(leaf.shape, np.float32)))
    try:
      save_peft(
        folder / "new", config, nest(items), loaded.stored, loaded.params, for_server=for_server
      )
    finally:
      assert not list(folder.iterdir()), "nothing is left behind"

  return BadInput(f"save: {name}", call, words)


def zeros(path, leaf, variant, rank):
  """Returns the node of a weight, (in, out), of zeros."""
  site = Site(path, leaf, LoraAxes((), (0,), (1,)), rank, None, kaiming_uniform)
  sizes = variant.sizes(site)
  arrays = {
    key: np.zeros(site.array_shape(words, **sizes), np.float32)
    for key, words in variant.arrays.items()
  }
  return LoraWeight.from_arrays(arrays, variant.table, site.axes, None)


FILES = [
  of_file("an unknown field", ("unknown field lora_alpha=8",), "ia3", lora_alpha=8),
  of_file("tensors of LoHa", ("hada_w1_a", "of LOHA", "says IA3"), "ia3", others),
  *(
    of_file(f"tensors of {kind}", (name, f"of {kind}", "says LOHA"), "loha", renamed(name))
    for kind, name in {
      "RANDLORA": f"{QUERY}.randlora_lambda",
      "UNILORA": "base_model.unilora_theta_d",
      "TINYLORA": "base_model.tinylora_v.group_0",
    }.items()
  ),
  *(
    of_file(f"the method {kind}", (f"got '{kind}'", "merge_and_unload"), "loha", peft_type=kind)
    for kind in ("RANDLORA", "UNILORA", "TINYLORA")
  ),
  of_file(
    "a missing gain", ("missing", "q_proj.hira_A (3, 32)"), "hira", without(f"{QUERY}.hira_A")
  ),
  of_file("a transposed gain", ("(1, 56), expected (32, 1)",), "ia3", feedforward_modules=["up"]),
  of_file("(IA)^3 of an embedding", ("is an embedding",), "ia3", target_modules=["embed_tokens"]),
  of_file("a rank of LoHa", ("hada_w1_a", "(48, 2), expected (48, 3)"), "loha", r=3),
  of_file(
    "a factor of 0", ("decompose_factor", "-1 or a positive", "0"), "lokr", decompose_factor=0
  ),
  of_file("another factor", ("lokr_w1 has shape (4, 4)",), "lokr", decompose_factor=2),
  of_file("LoKr of GPT-2", ("Conv1D", "no LoKr"), "lokr", model=GPT2, target_modules=["c_fc"]),
  of_file("a rank of bat", ("r=3 must divide", "q_proj", "32 x 48"), "miss_bat", r=3),
  of_file("a mini_r", ("mini_r=5 must divide", "48"), "miss_mini", mini_r=5),
  BadInput(
    "file: MiSS of fewer inputs",
    of_other_inputs,
    ("layers.0.mlp.down_proj is for 56 x 32", "has 64 x 32", "Load the base model"),
  ),
  of_gemma("load"),
  of_gemma("save"),
  of_file("a mode of MiSS", ("init_weights", "'bad'"), "miss", init_weights="bad"),
  of_file("no projections", ("save_projection=False", "merge"), "vera", save_projection=False),
  of_file("a projection", ("base_model.vera_A", "(6, 56)"), "vera", without("base_model.vera_A")),
  of_file(
    "VeRA of c_attn",
    ("fused", "query"),
    "vera",
    model=GPT2,
    target_modules=["c_attn"],
    layers_to_transform=None,
  ),
  of_file(
    "no ranks", ("rank_pattern", "q_proj", "got None"), "adalora", rank_pattern={"x": [True]}
  ),
  of_file(
    "short ranks",
    ("3 entries, expected init_r=4",),
    "adalora",
    rank_pattern={f"{QUERY.removeprefix('base_model.model.')}.lora_E": [True] * 3},
  ),
  of_file(
    "numbers as ranks",
    ("true and false", "[1, 0, 1, 1]"),
    "adalora",
    rank_pattern={f"{QUERY.removeprefix('base_model.model.')}.lora_E": [1, 0, 1, 1]},
  ),
  of_file("a token of a larger model", ("ids below 64", "99"), "tokens", token_indices=[3, 17, 99]),
  of_file("a token twice", ("different ids", "[3, 3, 9]"), "tokens", token_indices=[3, 3, 9]),
  of_file("a token missing", ("(3, 32), expected (2, 32)",), "tokens", token_indices=[3, 9]),
  of_file("another head", ("lm_head", "differs", "tied"), "tokens", changed(WTE, lambda x: x + 1)),
  of_file("tokens of shapes", ("real arrays",), "tokens", shapes_only=True),
  of_file(
    "tokens of a head",
    ("no embedding lm_head",),
    "lora_and_tokens",
    trainable_token_indices={"lm_head": [1]},
  ),
  of_file(
    "tokens of a saved embedding",
    ("both name transformer.wte",),
    "lora_and_tokens",
    target_modules=["wte"],
  ),
  of_file(
    "tokens as text", ("trainable_token_indices",), "lora_and_tokens", trainable_token_indices="3"
  ),
  of_file("norms of another model", ("'layernorm'", "ln_1"), "norms", target_modules=["layernorm"]),
  of_file("a tied head", ("wte is the head too", "untie"), "norms", modules_to_save=["wte"]),
  of_file(
    "a norm missing",
    ("missing", "ln_2.ln_tuning_layers"),
    "norms",
    target_modules=["ln_1", "ln_2", "ln_f"],
  ),
]
SAVES = [
  of_save(
    "LoHa of GPT-2",
    ("c_fc is a Conv1D", "no LoHa", "to_lora"),
    GPT2,
    {"h_0/mlp/up/kernel": (lj.LOHA,)},
  ),
  of_save(
    "VeRA of c_attn",
    ("c_attn is the fused", "to_lora"),
    GPT2,
    {"h_0/attn/query/kernel": (lj.VERA,)},
  ),
  of_save(
    "matrices of VeRA",
    ("one A and one B", "lora_shared/VeRA of d 0.5", "to_lora"),
    LLAMA,
    {QUERY_KERNEL: (lj.VERA,), VALUE: (lj.vera_variant(0.5),)},
  ),
  of_save(
    "ranks of MiSS",
    ("one rank for all modules", "q_proj has 2", "3", "to_lora"),
    LLAMA,
    {QUERY_KERNEL: (lj.MISS,), DOWN: (lj.MISS, 3)},
  ),
  of_save(
    "modes of MiSS", ("one mode", "bat"), LLAMA, {QUERY_KERNEL: (lj.MISS,), DOWN: (lj.MISS_BAT,)}
  ),
  of_save(
    "sizes of mini",
    ("one mini_r",),
    LLAMA,
    {QUERY_KERNEL: (lj.miss_mini_variant(4),), VALUE: (lj.miss_mini_variant(8),)},
  ),
  of_save(
    "factors of LoKr",
    ("one decompose_factor", "q_proj 32 x 48"),
    LLAMA,
    {QUERY_KERNEL: (lj.lokr_variant(4),), VALUE: (lj.lokr_variant(2),)},
  ),
  of_save(
    "another bias of (IA)^3",
    ("scales", "query/bias", "no bias", "save_merged"),
    LLAMA,
    {QUERY_KERNEL: (lj.ia3_variant({QUERY_KERNEL: None}),)},
  ),
  of_save(
    "one input of c_attn",
    ("inputs of transformer.h.0.attn.c_attn as a whole",),
    GPT2,
    {"h_0/attn/query/kernel": (lj.IA3_FEEDFORWARD,)},
  ),
  of_save(
    "biases with HiRA",
    ("HiRA trains no biases",),
    LLAMA,
    {QUERY_KERNEL: (lj.HIRA,)},
    extra=["layers_0/attn/query/bias"],
  ),
  of_save(
    "HiRA and LoHa",
    ("format is for LoRA", "HiRA", "lora_jax.convert"),
    LLAMA,
    {QUERY_KERNEL: (lj.HIRA,), DOWN: (lj.LOHA,)},
  ),
  of_save(
    "HiRA for servers",
    ("format is for LoRA", "HiRA"),
    LLAMA,
    {QUERY_KERNEL: (lj.HIRA,)},
    for_server=True,
  ),
  of_save(
    "tokens for servers",
    ("servers read no trainable tokens", "token_embedding"),
    LLAMA,
    {"token_embedding/embedding": (lj.trainable_tokens_variant([3]),), QUERY_KERNEL: (lj.LORA,)},
    for_server=True,
  ),
  of_save(
    "only a head", ("none is a normalization", "lm_head"), LLAMA, {}, extra=["lm_head/kernel"]
  ),
  of_save(
    "a tied head with norms",
    ("wte is the head too", "untie"),
    GPT2,
    {},
    extra=["ln_f/.*", "wte/embedding"],
  ),
  of_save(
    "norms with tokens",
    ("no modules_to_save", "ln_f/bias, ln_f/scale", "save_merged"),
    GPT2,
    {"wte/embedding": (lj.trainable_tokens_variant([3]),)},
    extra=["ln_f/.*"],
  ),
  of_save(
    "only biases", ("LN tuning trains no biases",), GPT2, {}, extra=[".*/bias", "ln_f/scale"]
  ),
]


def of_prompt(name, words, model="gpt2/tied", change=dict, **fields):
  """Returns the row of PEFT's prompt tuning of GPT-2 with other tensors or fields, or a model."""

  def call(folder):
    config = json.loads((PROMPTS / "gpt2" / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(change(load_file(PROMPTS / "gpt2" / FILE)), folder / FILE)
    return load_peft_prompt(folder, *loaded_shapes(model))

  return BadInput(f"prompt: {name}", call, words)


def of_prompt_save(name, words, tree, model="gpt2/tied"):
  """Returns the row of vectors that are written."""
  return BadInput(
    f"prompt: {name}",
    lambda folder: save_peft_prompt(folder / "new", tree, *loaded_shapes(model)),
    words,
  )


def loaded_shapes(name):
  """Returns the tensors and params of a small model."""
  if name.startswith("bert/"):
    config, params = load_bert(MODELS / name)
    return bert_tensors(config), params
  return base(name).stored, base(name).params


def of_slots(name, shape):
  return {"lora_added": {name: np.zeros(shape, np.float32)}}


ENCODER = "bert/bert_classifier"
WITH_PROMPTS = [
  of_prompt("a method of weights", ("expected peft_type", "'LORA'", "load_peft"), peft_type="LORA"),
  of_prompt("an unknown field", ("unknown field r=8",), r=8),
  of_prompt("no number", ("num_virtual_tokens", "None"), num_virtual_tokens=None),
  of_prompt(
    "another number",
    ("prompt_embeddings has shape (3, 32), expected (4, 32)",),
    num_virtual_tokens=4,
  ),
  of_prompt("another width", ("token_dim is 64", "32 dimensions", "golden/gpt2"), token_dim=64),
  of_prompt("a decoder too", ("num_transformer_submodules", "2"), num_transformer_submodules=2),
  of_prompt("a saved head", ("modules_to_save=['lm_head']",), modules_to_save=["lm_head"]),
  of_prompt("an encoder", ("is an encoder", "[CLS]", "LoRA"), ENCODER),
  of_prompt(
    "not finite",
    ("prompt_embeddings has values that are infinite",),
    change=lambda arrays: {name: array + np.inf for name, array in arrays.items()},
  ),
  of_prompt_save(
    "vectors of an encoder", ("is an encoder",), of_slots("prefix_embedding", (3, 16)), ENCODER
  ),
  of_prompt_save(
    "vectors of layers", ("got lora_added/prefix_layer",), of_slots("prefix_layer", (2, 3, 32))
  ),
  of_prompt_save(
    "vectors of another width",
    ("(3, 16), expected (slots, 32)",),
    of_slots("prefix_embedding", (3, 16)),
  ),
  BadInput(
    "prompt: read as an adapter of weights",
    lambda folder: load_peft(PROMPTS / "gpt2", *loaded_shapes("gpt2/tied")),
    ("'PROMPT_TUNING'", "load_peft_prompt"),
  ),
]
ROWS = [*FILES, *SAVES, *WITH_PROMPTS]
