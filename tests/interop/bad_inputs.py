"""Adapters in PEFT's format, and folders to export to, that must be refused."""

import functools
import json
import os
import struct

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.interop import (
  load_gguf_adapter,
  load_peft,
  save_gguf_adapter,
  save_merged,
  save_peft,
)
from lora_jax.models.checkpoints.gguf import open_gguf, write_gguf
from lora_jax.models.zoo import load_causal_lm

from tests.bad_inputs import BadInput
from tests.make_gguf_adapter_golden import FOLDER
from tests.make_peft_golden import GOLDEN, MODELS

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.transformer."
A = f"{PREFIX}h.0.attn.c_attn.lora_A.weight"
LLAMA = "base_model.model.model."
GGUF = FOLDER / "llama.gguf"

base = functools.cache(lambda name: load_causal_lm(MODELS / name))
golden_arrays = functools.cache(lambda name: load_file(GOLDEN / name / WEIGHTS))
golden_config = functools.cache(lambda name: json.loads((GOLDEN / name / CONFIG).read_text()))


def load(folder, config, arrays, model="gpt2/tied"):
  """Loads an adapter from a config, an object or bytes, and tensors, by name or as bytes."""
  text = config if isinstance(config, bytes) else json.dumps(config).encode()
  (folder / CONFIG).write_bytes(text)
  if isinstance(arrays, bytes):
    (folder / WEIGHTS).write_bytes(arrays)
  elif arrays is not None:
    save_file(
      {name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / WEIGHTS
    )
  return load_peft(folder, base(model).stored, base(model).params)


def of_config(name, words, adapter="fused", **fields):
  """Returns the row of a golden adapter with other fields in its config."""
  model = "gpt2/tied" if adapter == "fused" else "llama/llama_biased"
  return BadInput(
    f"config: {name}",
    lambda folder: load(folder, golden_config(adapter) | fields, golden_arrays(adapter), model),
    words,
  )


def of_text(name, words, text):
  """Returns the row of a config file with some bytes."""
  return BadInput(f"config file: {name}", lambda f: load(f, text, golden_arrays("fused")), words)


def of_arrays(name, words, change, adapter="fused", **fields):
  """Returns the row of a golden adapter whose tensors are changed."""
  model = "gpt2/tied" if adapter == "fused" else "llama/llama_biased"

  def call(folder):
    config, arrays = golden_config(adapter) | fields, change(dict(golden_arrays(adapter)))
    return load(folder, config, arrays, model)

  return BadInput(f"tensors: {name}", call, words)


def of_bytes(name, words, change):
  """Returns the row of a safetensors file whose bytes are changed."""

  def call(folder):
    return load(folder, golden_config("fused"), change((GOLDEN / "fused" / WEIGHTS).read_bytes()))

  return BadInput(f"safetensors: {name}", call, words)


def of_folder(name, words, files, error=FileNotFoundError):
  """Returns the row of a folder with some files, by name."""

  def call(folder):
    for path, text in files.items():
      (folder / path).parent.mkdir(exist_ok=True)
      (folder / path).write_text(text)
    return load_peft(folder, base("gpt2/tied").stored, base("gpt2/tied").params)

  return BadInput(f"folder: {name}", call, words, error)


def of_path(name, words, path, error=ValueError):
  """Returns the row of a path from which an adapter is loaded."""
  model = "gpt2/tied"
  return BadInput(
    f"path: {name}",
    lambda folder: load_peft(path, base(model).stored, base(model).params),
    words,
    error,
  )


def with_header(header, data=b""):
  """Returns a safetensors file of a header, an object or bytes, and the tensors' bytes."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data


def header_of(content):
  """Returns the header of a safetensors file, and the bytes after it."""
  stop = 8 + struct.unpack("<Q", content[:8])[0]
  return json.loads(content[8:stop]), content[stop:]


def with_entry(**fields):
  """Returns a change of one tensor's entry in the header."""

  def change(content):
    header, data = header_of(content)
    return with_header(header | {A: header[A] | fields}, data)

  return change


def repeated(content):
  header, data = header_of(content)
  text = json.dumps(header)
  return with_header((text[:-1] + f", {json.dumps(A)}: {json.dumps(header[A])}}}").encode(), data)


def renamed(*pairs):
  """Returns a change of names, by replacement of substrings."""

  def change(arrays):
    for substring, replacement in pairs:
      arrays = {name.replace(substring, replacement): array for name, array in arrays.items()}
    return arrays

  return change


def altered(**changes):
  """Returns a change of A's first element, or of its dtype."""

  def change(arrays):
    arrays[A] = arrays[A].astype(changes.get("dtype", np.float32))
    if "value" in changes:
      arrays[A][0, 0] = changes["value"]
    return arrays

  return change


def with_array(name, array):
  return lambda arrays: arrays | {name: np.asarray(array)}


def longer_table(arrays):
  table = np.asarray(base("llama/llama_biased").params["token_embedding"]["embedding"])
  return arrays | {f"{LLAMA}embed_tokens.base_layer.weight": np.pad(table, ((0, 2), (0, 0)))}


def changed_table(arrays):
  table = np.asarray(base("llama/llama_biased").params["token_embedding"]["embedding"])
  return arrays | {f"{LLAMA}embed_tokens.base_layer.weight": table + 1}


def changed_by_a_bit(arrays):
  """One element of a bfloat16 copy is off by one unit in the last place."""
  table = np.asarray(base("llama/llama_biased").params["token_embedding"]["embedding"])
  narrow = table.astype(ml_dtypes.bfloat16)
  narrow.view(np.uint16)[0, 0] += 1
  return arrays | {f"{LLAMA}embed_tokens.base_layer.weight": narrow}


def save_to(folder, base_folder=None):
  """Saves an adapter, or a merged model if the base model's folder is given."""
  model, config = base("gpt2/tied"), lj.LoraConfig(2, 4.0, "h_0/attn/query/kernel")
  if base_folder is None:  # is refused before the adapter is looked at
    return save_peft(folder, config, {}, model.stored, model.params)
  return save_merged(folder, base_folder, config, {}, model.stored, model.params)


CONFIGS = [
  of_config("rank as text", ("r must be an integer", "'8'"), r="8"),
  of_config("rank 0", ("r must be an integer in [1", "got 0"), r=0),
  of_config("rank -1", ("r must be an integer in [1", "got -1"), r=-1),
  of_config("rank 4.5", ("r must be an integer", "got 4.5"), r=4.5),
  of_config("rank true", ("r must be an integer", "got True"), r=True),
  of_config("rank null", ("r must be an integer", "got None"), r=None),
  of_config("rank 10^9", ("4 for 1000000000", "r or rank_pattern"), r=10**9),
  of_config("another rank", ("4 for 8", "(4, 32), expected (8, 32)", CONFIG), r=8),
  of_config("alpha null", ("lora_alpha must be", "got None"), lora_alpha=None),
  of_config("alpha as text", ("lora_alpha must be", "'16'"), lora_alpha="16"),
  of_config("alpha true", ("lora_alpha must be", "got True"), lora_alpha=True),
  of_config("alpha NaN", ("lora_alpha must be a finite number", "nan"), lora_alpha=float("nan")),
  of_config("alpha infinite", ("lora_alpha", "finite", "inf"), lora_alpha=float("inf")),
  of_config("alpha of 300 digits", ("lora_alpha", "finite", "bits"), lora_alpha=10**399),
  of_config("alpha 0", ("lora_alpha", "0"), lora_alpha=0),
  of_config("an alpha of 0", ("alpha_pattern['c_attn']", "0"), alpha_pattern={"c_attn": 0}),
  of_config("a list for alpha", ("lora_alpha must be", "[16]"), lora_alpha=[16]),
  of_config("dropout NaN", ("lora_dropout", "[0, 1]", "nan"), lora_dropout=float("nan")),
  of_config("dropout 2", ("lora_dropout", "[0, 1]", "2"), lora_dropout=2),
  of_config("targets null", ("target_modules is missing",), target_modules=None),
  of_config("targets a number", ("target_modules must be", "got 5"), target_modules=5),
  of_config("targets of numbers", ("target_modules[0]", "5"), target_modules=[5]),
  of_config("an empty name", ("target_modules", "''"), target_modules=[""]),
  of_config("targets of another model", ("('q_proj',) match none",), target_modules=["q_proj"]),
  of_config("more targets", ("missing", "c_fc.lora_A"), target_modules=["c_attn", "c_fc"]),
  of_config("a tied embedding adapted", ("wte is the head too",), target_modules=["wte"]),
  of_config("a broken expression", ("target_modules", "expression"), target_modules="(c_attn"),
  of_config("excluded numbers", ("exclude_modules[0]", "5"), exclude_modules=[5]),
  of_config("all excluded", ("exclude_modules ('c_attn',)",), exclude_modules=["c_attn"]),
  of_config("a broken exclusion", ("exclude_modules", "expression"), exclude_modules="["),
  of_config("an endless expression", ("match none",), target_modules=f"({'(x+)+' * 5})+!"),
  of_config(
    "an endless exclusion", ("0 to 1",), exclude_modules="(.+)+(.+)+!", layers_to_transform=[5]
  ),
  of_config("an endless rank_pattern", ("(4, 32)",), rank_pattern={"(.*)*.*!": 3, "(.*.*)*": 5}),
  of_config("a back reference", ("target_modules", "back references"), target_modules=r"(.)\1"),
  of_config("ranks as a list", ("rank_pattern must be",), rank_pattern=[8]),
  of_config("a rank of 0", ("rank_pattern['c_attn']", "got 0"), rank_pattern={"c_attn": 0}),
  of_config("a rank as text", ("rank_pattern['c_attn']", "'4'"), rank_pattern={"c_attn": "4"}),
  of_config("a broken rank_pattern", ("rank_pattern", "expression"), rank_pattern={"(": 4}),
  of_config("an alpha null", ("alpha_pattern['c_attn']", "None"), alpha_pattern={"c_attn": None}),
  of_config("a broken alpha_pattern", ("alpha_pattern", "expression"), alpha_pattern={"*": 4}),
  of_config("a boolean as text", ("use_rslora must be true or false", "'no'"), use_rslora="no"),
  of_config("DoRA as text", ("use_dora must be true or false", "'false'"), use_dora="false"),
  of_config("DoRA as a number", ("use_dora must be true or false", "1"), use_dora=1),
  of_config("bias of B as text", ("lora_bias must be", "'false'"), lora_bias="false"),
  of_config("fan_in_fan_out as text", ("fan_in_fan_out", "'true'"), fan_in_fan_out="true"),
  of_config("an unknown bias", ("bias must be one of none, all", "'some'"), bias="some"),
  of_config("layer 7 of 2", ("layers_to_transform has 7", "0 to 1"), layers_to_transform=[0, 7]),
  of_config("layer -1", ("layers_to_transform", "-1"), layers_to_transform=[-1]),
  of_config("layer true", ("layers_to_transform", "True"), layers_to_transform=[True]),
  of_config("a layer as text", ("layers_to_transform", "'0'"), layers_to_transform=["0"]),
  of_config("fewer layers", ("layers 0 to 1, expected 0", "layers_"), layers_to_transform=[0]),
  of_config(
    "an unknown list of layers",
    ("layers_pattern ('blocks',) matches no list",),
    layers_to_transform=[0],
    layers_pattern="blocks",
  ),
  of_config("a saved number", ("modules_to_save", "5"), modules_to_save=[5]),
  of_config("a saved module as text", ("modules_to_save", "'ln_f'"), modules_to_save="ln_f"),
  of_config("a saved expression", ("modules_to_save", "expression"), modules_to_save=["("]),
  of_config("a saved tied embedding", ("wte is the head too",), modules_to_save=["wte"]),
  of_config("unknown parameters", ("this model has no experts",), target_parameters=["experts"]),
  of_config(
    "DoRA with biases of B", ("no use_dora with lora_bias",), use_dora=True, lora_bias=True
  ),
  of_config(
    "DoRA of parameters",
    ("no use_dora with target_parameters",),
    use_dora=True,
    target_parameters=["down_proj"],
  ),
  of_config("DoRA without magnitudes", ("use_dora is true", "no lora_magnitude"), use_dora=True),
  of_config("OFT", ("expected peft_type LORA", "'OFT'", "merge"), peft_type="OFT"),
  of_config("prefix tuning", ("'PREFIX_TUNING'", "virtual tokens"), peft_type="PREFIX_TUNING"),
  of_config("no method", ("expected peft_type LORA", "None"), peft_type=None),
  of_config("a list of methods", ("expected peft_type LORA", "['LORA']"), peft_type=["LORA"]),
  of_config("KaSA", ("kasa_config", "no support for KaSA"), kasa_config={"a": 1}),
  of_config("PiSSA", ("init_lora_weights='pissa' changes the base",), init_lora_weights="pissa"),
  of_config("an initial list", ("init_lora_weights=['eva']",), init_lora_weights=["eva"]),
  of_config("a misspelled alpha", ("lora_alhpa=16", "did you mean lora_alpha"), lora_alhpa=16),
  of_config("a misspelled DoRA", ("use_dorra=True", "use_dora"), use_dorra=True),
  of_config("an unknown field", ("unknown field new_thing=3",), new_thing=3),
  of_config("a number as the base", ("base_model_name", "5"), base_model_name_or_path=5),
]
TEXTS = [
  of_text("empty", (CONFIG, "not JSON"), b""),
  of_text("truncated", (CONFIG, "not JSON"), b'{"peft_type": "LORA", "r": '),
  of_text("a list", (CONFIG, "expected a JSON object"), b"[]"),
  of_text("binary", (CONFIG, "UTF-8"), b"\xff\xfe\x00"),
  of_text("nested deeply", (CONFIG, "nested too deeply"), b'{"r":' + b"[" * 100_000),
  of_text("a key twice", (CONFIG, "'r' occurs twice"), b'{"peft_type": "LORA", "r": 4, "r": 8}'),
  of_text("a huge integer", (CONFIG, "10000 digits"), b'{"r": ' + b"9" * 10_000 + b"}"),
  of_text(
    "MLX's", ("MLX", "mlx_lm.fuse"), b'{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}'
  ),
]
ARRAYS = [
  of_arrays("NaN", (A, "not a number"), altered(value=np.nan)),
  of_arrays("infinite", (A, "infinite"), altered(value=np.inf)),
  of_arrays("beyond float32", (A, "float32"), altered(dtype=np.float64, value=1e300)),
  of_arrays("integers", (A, "I32", "F32"), altered(dtype=np.int32)),
  of_arrays("bytes", (A, "I8", "BF16"), altered(dtype=np.int8)),
  of_arrays("booleans", (A, "BOOL"), altered(dtype=bool)),
  of_arrays("complex", (A, "C64"), altered(dtype=np.complex64)),
  of_arrays("float8", (A, "F8_E4M3", "bfloat16"), altered(dtype=ml_dtypes.float8_e4m3fn)),
  of_arrays("none", ("has no tensors",), lambda arrays: {}),
  of_arrays("one missing", (f"missing {A}",), lambda x: {n: v for n, v in x.items() if n != A}),
  of_arrays("transposed", ("transposed", "(rank, in)"), lambda x: {n: v.T for n, v in x.items()}),
  of_arrays("no prefix", ("lack PEFT's prefix",), renamed(("base_model.model.", ""))),
  of_arrays("compiled", ("torch.compile",), renamed(("base_model.model.", "_orig_mod."))),
  of_arrays(
    "data-parallel", ("DistributedDataParallel",), renamed(("base_model", "module.base_m"))
  ),
  of_arrays(
    "several adapters",
    ("several adapters, first, second", "selected_adapters"),
    lambda x: {
      name.replace("lora_A", "lora_A.first").replace("lora_B", "lora_B.second"): array
      for name, array in x.items()
    },
  ),
  of_arrays(
    "by two names", ("by two names",), lambda x: x | {A.replace("A.w", "A.default.w"): x[A]}
  ),
  of_arrays("kohya", ("kohya",), renamed((".lora_A", ".lora_down"), (".lora_B", ".lora_up"))),
  of_arrays("diffusers", ("diffusers",), renamed((PREFIX, "unet."))),
  of_arrays("MLX", ("MLX",), renamed((".lora_A.weight", ".lora_a"), (".lora_B.weight", ".lora_b"))),
  of_arrays("IA3", ("IA3",), renamed((".lora_A.weight", ".ia3_l"))),
  of_arrays("LoHa", ("LOHA",), renamed((".lora_A.weight", ".hada_w1_a"))),
  of_arrays("prompts", ("PROMPT_TUNING or PREFIX_TUNING",), lambda x: {"prompt_embeddings": x[A]}),
  of_arrays("AdaLoRA", ("ADALORA",), with_array(A.replace("lora_A.weight", "lora_E"), [[1.0]])),
  of_arrays(
    "trained tokens",
    ("trainable tokens",),
    with_array(f"{PREFIX}wte.token_adapter.trainable_tokens_delta", [[1.0]]),
  ),
  of_arrays(
    "a whole model",
    ("whole model's checkpoint", "load_causal_lm"),
    lambda x: load_file(MODELS / "gpt2/tied/model.safetensors"),
  ),
  of_arrays(
    "bitsandbytes",
    ("quantized", "save_embedding_layers=False"),
    with_array(f"{PREFIX}h.0.attn.c_attn.base_layer.weight.absmax", [1.0]),
  ),
  of_arrays(
    "GPTQ",
    ("quantized", "qweight"),
    with_array(f"{PREFIX}h.0.mlp.c_fc.qweight", np.zeros((2, 2), np.int32)),
  ),
  of_arrays(
    "magnitudes without use_dora",
    ("use_dora is not true",),
    with_array(f"{PREFIX}h.0.attn.c_attn.lora_magnitude_vector", np.ones(96, np.float32)),
  ),
  of_arrays(
    "a trained tied head",
    ("lm_head.weight", "tied", "tie_word_embeddings"),
    with_array("base_model.model.lm_head.weight", np.ones((64, 32), np.float32)),
  ),
  of_arrays(
    "an adapted tied head",
    ("lm_head.lora_A", "tied", "Untie"),
    with_array("base_model.model.lm_head.lora_A.weight", np.ones((4, 32), np.float32)),
  ),
  of_arrays(
    "a changed norm",
    ("differs from the base model's transformer.ln_f.weight", "modules_to_save"),
    with_array(f"{PREFIX}ln_f.weight", np.full(32, 7, np.float32)),
  ),
  of_arrays(
    "more layers",
    ("layers 0 to 9", "another depth"),
    lambda x: x | {A.replace("h.0", f"h.{i}"): x[A] for i in range(2, 10)},
  ),
  of_arrays("other values", ("differs from the base model's",), changed_table, "llama_saved"),
  of_arrays("a bit of a copy", ("differs from the base",), changed_by_a_bit, "llama_saved"),
  of_arrays("added tokens", ("2 more", "resize_token_embeddings(66)"), longer_table, "llama_saved"),
  of_arrays(
    "a saved head with added tokens",
    ("lm_head", "2 more", "resize_token_embeddings(66)"),
    lambda x: x | {"base_model.model.lm_head.weight": np.ones((66, 32), np.float32)},
    "llama_saved",
  ),
  of_arrays(
    "adapted added tokens",
    ("2 more", "resize_token_embeddings(66)"),
    lambda x: x | {f"{LLAMA}embed_tokens.lora_embedding_A": np.ones((2, 66), np.float32)},
    "llama_saved",
  ),
]
BYTES = [
  of_bytes("empty", ("truncated or not",), lambda content: b""),
  of_bytes("7 bytes", ("truncated or not",), lambda content: content[:7]),
  of_bytes("half", ("truncated or not",), lambda content: content[: len(content) // 2]),
  of_bytes("one byte less", ("truncated or not",), lambda content: content[:-1]),
  of_bytes("one byte more", ("truncated or not",), lambda content: content + b"\0"),
  of_bytes("a header of 10^18", ("truncated or not",), lambda x: struct.pack("<Q", 10**18) + x[8:]),
  of_bytes("a tensor twice", ("lora_A.weight", "twice"), repeated),
  of_bytes("offsets beyond the end", ("truncated or not",), with_entry(data_offsets=[0, 10**12])),
  of_bytes("overlapping offsets", ("truncated or not",), with_entry(data_offsets=[256, 768])),
  of_bytes("negative offsets", ("truncated or not",), with_entry(data_offsets=[-512, 0])),
  of_bytes("a negative shape", ("truncated or not",), with_entry(shape=[-4, 32])),
  of_bytes("a huge shape", ("truncated or not",), with_entry(shape=[2**62, 2**62])),
  of_bytes("an unknown dtype", ("truncated or not",), with_entry(dtype="F7")),
  of_bytes("no UTF-8", ("truncated or not",), lambda content: with_header(b"\xff\xfe")),
  of_bytes("a list", ("truncated or not",), lambda content: with_header(b"[]")),
  of_bytes("nested deeply", ("truncated or not",), lambda content: with_header(b"[" * 100_000)),
  of_bytes("a pickle", ("pickle",), lambda content: b"\x80\x02}q\x00."),
  of_bytes(
    "a git-lfs pointer", ("git-lfs",), lambda content: b"version https://git-lfs.github.com"
  ),
]
LORA = json.dumps({"peft_type": "LORA", "target_modules": ["c_attn"]})
FOLDERS = [
  of_folder(
    "a pickle",
    ("adapter_model.bin", "pickle", "PeftModel"),
    {CONFIG: LORA, "adapter_model.bin": ""},
  ),
  of_folder("no tensors", (WEIGHTS, "does not exist"), {CONFIG: LORA}),
  of_folder("MLX's file", ("MLX", "fuse"), {CONFIG: LORA, "adapters.safetensors": ""}),
  of_folder("diffusers", ("diffusers",), {"pytorch_lora_weights.safetensors": ""}),
  of_folder("a whole model", ("whole model", "load_causal_lm"), {"config.json": "{}"}),
  of_folder("a run", ("folder of a run", "peft"), {f"peft/{CONFIG}": LORA}),
  of_folder("a Trainer's output", ("checkpoint-",), {f"checkpoint-5/{CONFIG}": LORA}),
  of_folder("an adapter inside", ("inside",), {f"mine/{CONFIG}": LORA}),
  of_folder("nothing", (CONFIG, "does not exist"), {}),
]
PATHS = [
  of_path("a bucket", ("gs://bucket/adapter", "local"), "gs://bucket/adapter"),
  of_path("a hub address", ("hf://", "local"), "hf://user/adapter"),
  of_path(
    "a hub repository", ("not a folder", "snapshot_download"), "u/adapter", FileNotFoundError
  ),
  of_path("a file", ("not a folder",), __file__, FileNotFoundError),
  of_path("a device", ("not a folder",), os.devnull, FileNotFoundError),
  BadInput("save to a bucket", lambda folder: save_to("s3://bucket/x"), ("s3://bucket/x", "local")),
  BadInput("save to a folder", save_to, ("nothing is overwritten",), FileExistsError),
  BadInput(
    "merge a bucket", lambda folder: save_to(folder / "new", "gs://b/x"), ("gs://b/x", "local")
  ),
]


def of_gguf(name, words, change=dict, fields=None, model="llama/llama3", error=ValueError, **about):
  """Returns the row of a golden GGUF adapter with other tensors, fields, kind or architecture."""

  def call(folder):
    file = open_gguf(GGUF)
    arrays = {key: x.bytes().view(np.float32).reshape(x.shape) for key, x in file.tensors.items()}
    given = {"adapter.type": "lora", "adapter.lora.alpha": 8.0} | (fields or {})
    given = {key: value for key, value in given.items() if value is not None}
    options = {"architecture": "llama", "kind": "adapter"} | about
    write_gguf(folder / "bad.gguf", metadata=given, tensors=change(arrays), **options)
    return load_gguf_adapter(folder / "bad.gguf", base(model).module.config, base(model).params)

  return BadInput(f"GGUF: {name}", call, words, error)


def of_gguf_bytes(name, words, change):
  """Returns the row of a golden GGUF adapter whose bytes are changed."""

  def call(folder):
    (folder / "bad.gguf").write_bytes(change(GGUF.read_bytes()))
    return load_gguf_adapter(folder / "bad.gguf", base("llama/llama3").module.config, {})

  return BadInput(f"GGUF: {name}", call, words)


def without(*names):
  return lambda arrays: {name: array for name, array in arrays.items() if name not in names}


def swapped(arrays):
  """Returns A and B as llama.cpp's converter writes them for a transposed weight."""
  factors = {"a": np.ones((4, 32), np.float32), "b": np.ones((128, 4), np.float32)}
  return {f"blk.0.ffn_down.weight.lora_{name}": array for name, array in factors.items()}


def to_gguf(
  name, words, model="gpt2/tied", dtype="float32", factor=1.0, error=ValueError, **config
):
  """Returns the row of an adapter made here that llama.cpp cannot express."""

  def call(folder):
    settings = {"rank": 2, "alpha": 4.0, "target": ".*/attn/out/kernel"} | config
    lora_config = lj.LoraConfig(**settings)
    params = base(model).params
    adapted = lj.lora(base(model).call, lora_config)
    trainable = adapted.init(jax.random.key(0), params, np.zeros((1, 2), np.int32))
    trainable = jax.tree.map(lambda leaf: leaf * factor, trainable)
    options = {"dtype": dtype}
    save_gguf_adapter(
      folder / "new.gguf", lora_config, trainable, base(model).module.config, params, **options
    )

  return BadInput(f"to GGUF: {name}", call, words)


QUERY_A = "blk.0.attn_q.weight.lora_a"
GGUFS = [
  of_gguf("a model", ("general.type is 'model'", "load_causal_lm"), kind="model"),
  of_gguf(
    "another architecture", ("'qwen2'", "expected 'llama'", "trained on"), architecture="qwen2"
  ),
  of_gguf("no type", ("adapter.type", "'lora'"), fields={"adapter.type": None}),
  of_gguf("another type", ("adapter.type", "control"), fields={"adapter.type": "control"}),
  of_gguf("alpha as text", ("adapter.lora.alpha", "'8'"), fields={"adapter.lora.alpha": "8"}),
  of_gguf(
    "an infinite alpha", ("adapter.lora.alpha", "inf"), fields={"adapter.lora.alpha": np.inf}
  ),
  of_gguf(
    "activated LoRA",
    ("invocation_tokens", "no support"),
    fields={"adapter.alora.invocation_tokens": [5, 6]},
  ),
  of_gguf("no tensors", ("it has no tensors",), lambda arrays: {}),
  of_gguf("no A", (f"missing {QUERY_A}",), without(QUERY_A)),
  of_gguf("no B", ("missing blk.0.attn_q.weight.lora_b",), without(QUERY_A.replace("_a", "_b"))),
  of_gguf(
    "a trained norm",
    ("unexpected blk.0.attn_norm.weight", "neither"),
    lambda arrays: arrays | {"blk.0.attn_norm.weight": np.ones(32, np.float32)},
  ),
  of_gguf(
    "more layers",
    ("unexpected blk.9.attn_q.weight.lora_a", "did you mean blk."),
    lambda arrays: arrays | {QUERY_A.replace("blk.0", "blk.9"): arrays[QUERY_A]},
  ),
  of_gguf(
    "an adapter of another width",
    (QUERY_A, "(4, 48)", "(4, 32)", "trained on"),
    lambda arrays: arrays | {QUERY_A: np.ones((4, 48), np.float32)},
  ),
  of_gguf(
    "another rank of A",
    (QUERY_A, "(3, 32)", "rank of 4"),
    lambda arrays: arrays | {QUERY_A: np.ones((3, 32), np.float32)},
  ),
  of_gguf(
    "swapped factors",
    ("swapped", "convert_lora_to_gguf.py", "PEFT"),
    swapped,
    model="gpt2/tied",
    architecture="gpt2",
  ),
  of_gguf(
    "numbers that are not finite",
    (QUERY_A, "infinite or not a number"),
    lambda arrays: arrays | {QUERY_A: np.full((4, 32), np.nan, np.float32)},
  ),
  of_gguf(
    "a tied embedding",
    ("token_embd.weight", "tied", "llama.cpp aborts", "untie"),
    lambda arrays: (
      {f"token_embd.weight.lora_{x}": np.ones((64, 2), np.float32) for x in "ab"}
      | {"token_embd.weight.lora_b": np.ones((32, 2), np.float32)}
    ),
    model="gpt2/tied",
    architecture="gpt2",
  ),
  of_gguf(
    "positions",
    ("position_embd.weight", "wpe/embedding"),
    lambda arrays: {
      "position_embd.weight.lora_a": np.ones((24, 2), np.float32),
      "position_embd.weight.lora_b": np.ones((32, 2), np.float32),
    },
    model="gpt2/tied",
    architecture="gpt2",
  ),
  of_gguf_bytes("truncated", ("truncated",), lambda content: content[: len(content) // 2]),
  of_gguf_bytes("safetensors", ("not a GGUF file",), lambda content: with_header({})),
  to_gguf("DoRA", ("plain LoRA", "DoRA", "lora_jax.convert", "--merged"), variant=lj.DORA),
  to_gguf("biases", ("no fully trained leaves", "h_0/attn/out/bias"), extra=".*/out/bias"),
  to_gguf("norms", ("no fully trained leaves", "ln_f/scale"), extra="ln_f/scale"),
  to_gguf(
    "a tied embedding",
    ("wte/embedding", "tied", "llama.cpp aborts", "untie"),
    target="wte/embedding",
  ),
  to_gguf("positions", ("wpe/embedding", "without its adapter"), target="wpe/embedding"),
  to_gguf("too large for float16", ("attn_output", "float16"), dtype="float16", factor=1e6),
  to_gguf("not finite", ("attn_output", "not finite"), factor=float("nan")),
  to_gguf("another activation", ("gelu_new", "relu"), model="gpt2/relu"),
  BadInput(
    "to GGUF: an existing file",
    lambda folder: save_gguf_adapter(__file__, *[None] * 4),
    ("nothing is overwritten",),
    FileExistsError,
  ),
  BadInput(
    "to GGUF: a bucket",
    lambda folder: save_gguf_adapter("gs://bucket/x.gguf", *[None] * 4),
    ("gs://bucket/x.gguf", "local"),
  ),
]
ROWS = [*CONFIGS, *TEXTS, *ARRAYS, *BYTES, *FOLDERS, *PATHS, *GGUFS]
