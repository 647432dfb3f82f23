"""Folders of models that must be refused: configs, tensors, files, formats and addresses."""

import functools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from lora_jax.models.bert.folder import load_bert
from lora_jax.models.bert.model import BertConfig
from lora_jax.models.checkpoints.hub import find_folder, new_folder
from lora_jax.models.deberta.folder import load_deberta
from lora_jax.models.deberta.model import DebertaConfig
from lora_jax.models.gpt2.folder import load_gpt2
from lora_jax.models.gpt2.model import GPT2Config
from lora_jax.models.llama.folder import load_llama
from lora_jax.models.llama.model import LlamaConfig, MixtureConfig, RopeScaling
from lora_jax.models.zoo import load_causal_lm, plan_causal_lm

from tests.bad_inputs import BadInput
from tests.paths import ROOT

GOLDEN = ROOT / "tests" / "golden"
FOLDERS = {
  "gpt2": GOLDEN / "gpt2" / "tied",
  "untied": GOLDEN / "gpt2" / "untied",
  "llama": GOLDEN / "llama" / "llama2",
  "llama3": GOLDEN / "llama" / "llama3",
  "mistral": GOLDEN / "llama" / "mistral",
  "qwen2": GOLDEN / "llama" / "qwen2",
  "qwen2_mixed": GOLDEN / "llama" / "qwen2_mixed",
  "qwen3_moe": GOLDEN / "llama" / "qwen3_moe",
  "mixtral": GOLDEN / "llama" / "mixtral",
  "bert": GOLDEN / "bert" / "bert",
  "classifier": GOLDEN / "bert" / "bert_classifier",
  "roberta": GOLDEN / "bert" / "roberta",
  "deberta": GOLDEN / "deberta" / "v3",
}
LOADERS = {"bert": load_bert, "classifier": load_bert, "roberta": load_bert}
LOADERS |= {"deberta": load_deberta}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, np.ndarray]


@functools.cache
def tensors_of(name: str) -> Tensors:
  return load_file(FOLDERS[name] / WEIGHTS)


def load(name: str, folder: Path) -> Any:
  return LOADERS.get(name, load_causal_lm)(folder)


def config_row(name: str, fields: dict[str, Any], *words: str) -> BadInput:
  """A folder whose config.json has other values; the weights are those of the model."""

  def call(folder: Path) -> None:
    for file in FOLDERS[name].iterdir():
      (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    written = json.loads((FOLDERS[name] / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(written))
    load(name, folder)

  shown = ", ".join(f"{key} {str(value)[:30]}" for key, value in fields.items())
  return BadInput(f"{name} of {shown}", call, ("config.json", *words))


def tensor_row(
  title: str, name: str, change: Callable[[Tensors], Tensors], *words: str, **fields: Any
) -> BadInput:
  """A folder with other tensors, and maybe other values in config.json."""

  def call(folder: Path) -> None:
    written = json.loads((FOLDERS[name] / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(written))
    changed = change(dict(tensors_of(name)))
    save_file({key: np.ascontiguousarray(x) for key, x in changed.items()}, folder / WEIGHTS)
    load(name, folder)

  return BadInput(f"{name}: {title}", call, words)


def files_row(
  title: str, files: dict[str, bytes | str], *words: str, error: type[Exception] = ValueError
) -> BadInput:
  """A folder of any files; with a config of GPT-2 unless it is given, and without it if empty."""

  def call(folder: Path) -> None:
    config = (FOLDERS["gpt2"] / "config.json").read_text()
    for path, content in ({"config.json": config} | files).items():
      (folder / path).parent.mkdir(parents=True, exist_ok=True)
      if content:
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
    load_causal_lm(folder)

  return BadInput(f"files: {title}", call, words, error)


def name_row(name: Any, *words: str, load: Any = find_folder) -> BadInput:
  return BadInput(f"name {name!r} to {load.__name__}", lambda _: load(name), words)


def load_fifo(folder: Path) -> None:
  os.mkfifo(folder / "model.gguf")
  load_causal_lm(folder / "model.gguf")


def file_of(header: Any, body: bytes = bytes(16), size: int | None = None) -> bytes:
  """A safetensors file of a header, which may be wrong."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text) if size is None else size) + text + body


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
  return lambda tensors: {change(name): x for name, x in tensors.items()}


def with_rows(count: int, *names: str) -> Callable[[Tensors], Tensors]:
  def change(tensors: Tensors) -> Tensors:
    return tensors | {name: np.resize(tensors[name], (count, 32)) for name in names}

  return change


def built_row(kind: type, fields: dict[str, Any], *words: str) -> BadInput:
  return BadInput(f"{kind.__name__}({fields})", lambda _: kind(**fields), words)


NAN, INF = float("nan"), float("inf")
EMBED, LAYER = "transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SECOND = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}

CONFIGS = [
  # GPT-2
  *(
    config_row("gpt2", {"layer_norm_epsilon": value}, "layer_norm_epsilon must be", shown)
    for value, shown in [(NAN, "nan"), (INF, "inf"), (-1e-5, "-1e-05"), (True, "True")]
  ),
  config_row("gpt2", {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon must be", "'1e-5'"),
  config_row("gpt2", {"layer_norm_epsilon": 1}, "layer_norm_epsilon must be", "[0, 1)"),
  config_row("gpt2", {"layer_norm_epsilon": 10**400 - 1}, "layer_norm_epsilon must be", "bits"),
  config_row("gpt2", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
  config_row("gpt2", {"tie_word_embeddings": 0}, "tie_word_embeddings must be true or false", "0"),
  config_row("gpt2", {"scale_attn_weights": "true"}, "scale_attn_weights='true'", "True"),
  config_row("gpt2", {"n_layer": 10**9}, "n_layer", "10000]", "1000000000"),
  config_row("gpt2", {"n_layer": 9999}, "n_layer is 9999", "the weights have 2 layers"),
  config_row("gpt2", {"n_layer": 1}, "n_layer is 1", "the weights have 2 layers"),
  config_row("gpt2", {"n_layer": 0}, "n_layer", "[1,", "got 0"),
  config_row("gpt2", {"n_layer": 2.0}, "n_layer must be an integer", "2.0"),
  config_row("gpt2", {"n_layer": True}, "n_layer must be an integer", "True"),
  config_row("gpt2", {"n_layer": None}, "n_layer must be an integer", "None"),
  config_row("gpt2", {"n_layer": [2]}, "n_layer must be an integer", "[2]"),
  config_row("gpt2", {"n_embd": -32}, "n_embd", "-32"),
  config_row("gpt2", {"n_embd": 10**18}, "n_embd", str(10**18)),
  config_row("gpt2", {"n_embd": 10**6}, "wte.weight has shape (64, 32)", "1000000"),
  config_row("gpt2", {"n_head": 0}, "n_head", "got 0"),
  config_row("gpt2", {"n_head": -4}, "n_head", "got -4"),
  config_row("gpt2", {"n_head": 64}, "num_heads must divide embed_dim", "64 heads for 32"),
  config_row("gpt2", {"n_inner": 1.5}, "n_inner must be", "1.5"),
  config_row("gpt2", {"n_positions": 0}, "n_positions", "got 0"),
  config_row("gpt2", {"vocab_size": 0}, "vocab_size", "got 0"),
  config_row("gpt2", {"vocab_size": 10**12}, "vocab_size", str(10**12)),
  config_row("gpt2", {"activation_function": 5}, "activation_function must be a string", "5"),
  config_row("gpt2", {"activation_function": None}, "activation_function must be a string"),
  config_row("gpt2", {"activation_function": "mish"}, "activation_function", "gelu_new", "'mish'"),
  config_row("gpt2", {"model_type": 5}, "no language model of type 5"),
  # The Llama family
  *(
    config_row("llama", {"rms_norm_eps": value}, "rms_norm_eps must be", shown)
    for value, shown in [(NAN, "nan"), (INF, "inf"), (-1.0, "-1.0"), (False, "False")]
  ),
  *(
    config_row("llama", {"rope_parameters": {"rope_theta": value}}, "rope_theta must be", shown)
    for value, shown in [
      (NAN, "nan"),
      (INF, "inf"),
      (-1e4, "-10000.0"),
      (0, "got 0"),
      (True, "True"),
      ("1e4", "'1e4'"),
    ]
  ),
  config_row("llama", {"rope_parameters": "linear"}, "rope_parameters must be", "'linear'"),
  config_row("llama", {"rope_scaling": [2.0]}, "rope_scaling", "objects", "[2.0]"),
  config_row("llama", {"rope_scaling": {"rope_type": ["linear"]}}, "rope_type ['linear']"),
  config_row("llama", {"rope_scaling": {"type": "linear"}}, "linear", "missing factor"),
  *(
    config_row("llama", {"rope_scaling": {"type": "linear", "factor": value}}, "factor", shown)
    for value, shown in [(NAN, "nan"), (-2.0, "-2.0"), (0, "got 0"), (True, "True"), ("2", "'2'")]
  ),
  config_row("llama", {"rope_scaling": {"type": "llama3", "factor": 8.0}}, "missing low_freq"),
  config_row(
    "llama3",
    {
      "rope_parameters": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 4.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
      }
    },
    "low_freq_factor must be below high_freq_factor",
    "4.0 and 4.0",
  ),
  config_row("llama", {"partial_rotary_factor": "half"}, "partial_rotary_factor='half'"),
  config_row("llama", {"attention_bias": "true"}, "attention_bias must be", "'true'"),
  config_row("llama", {"mlp_bias": 1}, "mlp_bias must be", "got 1"),
  config_row("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be", "'no'"),
  config_row("llama", {"hidden_act": ["silu"]}, "hidden_act must be a string", "['silu']"),
  config_row("llama", {"head_dim": 7}, "even size of a head, got 7"),
  config_row("llama", {"num_key_value_heads": 0}, "num_key_value_heads", "got 0"),
  config_row("llama", {"num_key_value_heads": 3}, "num_kv_heads must divide num_heads"),
  config_row("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers", "1000000000"),
  config_row("llama", {"num_hidden_layers": 3}, "num_hidden_layers is 3", "have 2 layers"),
  config_row("llama", {"vocab_size": "64"}, "vocab_size must be an integer", "'64'"),
  *(
    config_row("mistral", {"sliding_window": value}, "sliding_window", shown)
    for value, shown in [(0, "got 0"), (-4, "got -4"), (4.5, "4.5"), (True, "True"), ("4", "'4'")]
  ),
  config_row("qwen2", {"use_sliding_window": "false"}, "use_sliding_window must be", "'false'"),
  config_row("qwen2_mixed", {"sliding_window": 0}, "sliding_window", "got 0"),
  config_row("qwen2_mixed", {"layer_types": 5}, "layer_types must be a list", "got 5"),
  config_row("qwen2_mixed", {"layer_types": ["a", 5]}, "layer_types[0]", "sliding_attention", "a"),
  config_row("qwen2_mixed", {"layer_types": ["full_attention"] * 3}, "layer_types", "got 3"),
  config_row(
    "qwen2_mixed", {"layer_types": None, "max_window_layers": -1}, "max_window_layers", "-1"
  ),
  config_row("qwen3_moe", {"num_experts": 0, "num_local_experts": 0}, "num_experts", "got 0"),
  config_row("qwen3_moe", {"num_experts_per_tok": 9}, "from 1 to num_experts = 4, got 9"),
  config_row("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob must be", "'yes'"),
  config_row("mixtral", {"num_local_experts": 10**9}, "num_experts", "1000000000"),
  # Encoders
  *(
    config_row("bert", {"layer_norm_eps": value}, "layer_norm_eps must be", shown)
    for value, shown in [(NAN, "nan"), (-1.0, "-1.0"), (True, "True")]
  ),
  *(
    config_row("bert", {"hidden_dropout_prob": value}, "hidden_dropout_prob must be", shown)
    for value, shown in [(1.0, "1.0"), (-0.1, "-0.1"), (NAN, "nan"), ("0.1", "'0.1'")]
  ),
  config_row("bert", {"classifier_dropout": 2}, "classifier_dropout must be", "[0, 1)", "got 2"),
  config_row("bert", {"is_decoder": "false"}, "is_decoder='false'", "expected False"),
  config_row("bert", {"model_type": ["bert"]}, "model_type", "['bert']"),
  config_row("bert", {"architectures": 5}, "architectures must be", "got 5"),
  config_row("bert", {"type_vocab_size": 0}, "type_vocab_size", "got 0"),
  config_row("bert", {"pad_token_id": 60}, "pad_id must be below vocab_size = 60, got 60"),
  config_row("bert", {"num_hidden_layers": 10**9}, "num_hidden_layers", "1000000000"),
  config_row("bert", {"num_hidden_layers": 5000}, "num_hidden_layers is 5000", "have 2 layers"),
  config_row("roberta", {"pad_token_id": 30}, "first position is pad_id + 1 = 31"),
  config_row("classifier", {"id2label": None, "num_labels": "3"}, "num_labels must be", "'3'"),
  config_row("classifier", {"id2label": {}}, "num_labels", "got 0"),
  config_row("deberta", {"pos_att_type": [5]}, "pos_att_type[0] must be one of c2p, p2c", "5"),
  config_row("deberta", {"pos_att_type": "p2p"}, "pos_att_type", "c2p, p2c", "p2p"),
  config_row("deberta", {"norm_rel_ebd": 5}, "norm_rel_ebd must be a string", "5"),
  config_row("deberta", {"share_att_key": "yes"}, "share_att_key must be true or false", "'yes'"),
  config_row("deberta", {"position_biased_input": 1}, "position_biased_input must be", "got 1"),
  config_row("deberta", {"max_relative_positions": 2.5}, "max_relative_positions", "2.5"),
  config_row("deberta", {"conv_kernel_size": -3}, "conv_kernel_size", "-3"),
  config_row("deberta", {"conv_act": 3}, "conv_act must be a string", "3"),
  config_row("deberta", {"pooler_dropout": INF}, "pooler_dropout must be", "inf"),
  # Quantized, by config.json
  *(
    config_row(name, {key: value}, key, "quantized", shown, "dequantize")
    for name, key, value, shown in [
      ("gpt2", "quantization_config", {"quant_method": "bitsandbytes"}, "by bitsandbytes"),
      ("llama", "quantization_config", {"quant_method": "gptq", "bits": 4}, "by gptq"),
      ("llama", "quantization", {"group_size": 64, "bits": 4}, "quantized"),
      ("bert", "quantization_config", 5, "quantized"),
      ("deberta", "quantization_config", {"quant_method": "fp8"}, "by fp8"),
    ]
  ),
]

BUILT = [
  built_row(GPT2Config, {"num_layers": 0}, "num_layers", "got 0"),
  built_row(BertConfig, {"pooler": "yes"}, "pooler must be true or false", "'yes'"),
  built_row(GPT2Config, {"dtype": "foo"}, "dtype must be one of float32", "'foo'"),
  built_row(GPT2Config, {"dtype": None}, "dtype must be one of float32"),
  built_row(GPT2Config, {"param_dtype": "float64"}, "param_dtype must be one of", "'float64'"),
  built_row(LlamaConfig, {"remat": 5}, "remat must be", "5"),
  built_row(LlamaConfig, {"attention": None}, "attention must be a string", "None"),
  built_row(LlamaConfig, {"sliding_window": -4}, "sliding_window", "-4"),
  built_row(LlamaConfig, {"rms_norm_epsilon": NAN}, "rms_norm_epsilon", "nan"),
  built_row(LlamaConfig, {"rope_theta": -1.0}, "rope_theta", "-1.0"),
  built_row(LlamaConfig, {"window_layers": (0, -1)}, "window_layers", "-1"),
  built_row(LlamaConfig, {"norm_offset": INF}, "norm_offset", "inf"),
  built_row(LlamaConfig, {"mixture": 4}, "mixture must be", "MixtureConfig", "4"),
  built_row(RopeScaling, {"kind": "yarn", "factor": 2.0}, "kind must be one of linear, llama3"),
  built_row(RopeScaling, {"kind": "linear", "factor": -1.0}, "factor", "-1.0"),
  built_row(MixtureConfig, {"num_experts": 4, "experts_per_token": 0}, "experts_per_token", "0"),
  built_row(BertConfig, {"hidden_dropout": 1.0}, "hidden_dropout", "[0, 1)", "1.0"),
  built_row(BertConfig, {"pad_id": -1}, "pad_id", "-1"),
  built_row(DebertaConfig, {"conv_size": 0}, "conv_size", "got 0"),
  built_row(DebertaConfig, {"pooler_dropout": NAN}, "pooler_dropout", "nan"),
]

TENSORS = [
  # The head and the vocabulary
  tensor_row(
    "a tied head that differs",
    "gpt2",
    lambda x: x | {"lm_head.weight": x[EMBED] + 1},
    "lm_head.weight (64, 32) differs from transformer.wte.weight",
    "Set tie_word_embeddings to false",
  ),
  tensor_row(
    "a tied head of more rows",
    "gpt2",
    lambda x: x | {"lm_head.weight": np.resize(x[EMBED], (72, 32))},
    "lm_head.weight (72, 32) differs from transformer.wte.weight (64, 32)",
  ),
  tensor_row(
    "an untied head that is missing",
    "llama",
    lambda x: {key: value for key, value in x.items() if key != "lm_head.weight"},
    "lm_head.weight is not in the files",
    "Set tie_word_embeddings to true",
  ),
  tensor_row(
    "3 rows more than the vocabulary",
    "gpt2",
    with_rows(67, EMBED),
    "wte.weight has 67 rows, 3 more than vocab_size 64",
    "Set vocab_size to 67 in config.json",
  ),
  tensor_row(
    "rows that pad the vocabulary",
    "llama",
    with_rows(128, "model.embed_tokens.weight", "lm_head.weight"),
    "embed_tokens.weight has 128 rows, 64 more than vocab_size 64",
    "Set vocab_size to 128",
  ),
  tensor_row(
    "fewer rows than the vocabulary",
    "gpt2",
    with_rows(60, EMBED),
    "wte.weight has 60 rows, 4 fewer than vocab_size 64",
  ),
  tensor_row(
    "only the embedding is resized",
    "llama",
    with_rows(67, "model.embed_tokens.weight"),
    "model.embed_tokens.weight has 67, lm_head.weight has 64",
    "resize_token_embeddings",
  ),
  # Quantized weights
  *(
    tensor_row(
      f"quantized, with {name}",
      "llama",
      lambda x, name=name, dtype=dtype, weight=weight: (
        x
        | {name: np.zeros((4, 1), dtype)}
        | ({} if weight is None else {Q_PROJ: x[Q_PROJ].astype(weight)})
      ),
      f"quantized ({method})",
      name,
      "dequantize",
    )
    for name, dtype, weight, method in [
      (f"{Q_PROJ}.absmax", np.float32, np.uint8, "bitsandbytes"),
      (f"{Q_PROJ}.quant_map", np.float32, np.uint8, "bitsandbytes"),
      (f"{Q_PROJ}.quant_state.bitsandbytes__nf4", np.uint8, np.uint8, "bitsandbytes"),
      (Q_PROJ.replace("weight", "SCB"), np.float32, np.int8, "bitsandbytes"),
      (Q_PROJ.replace("weight", "qweight"), np.int32, None, "GPTQ or AWQ"),
      (Q_PROJ.replace("weight", "qzeros"), np.int32, None, "GPTQ or AWQ"),
      (Q_PROJ.replace("weight", "weight_packed"), np.int32, None, "compressed-tensors"),
      (f"{Q_PROJ}_scale", np.float32, ml_dtypes.float8_e4m3fn, "float8 or int8 with scales"),
      (f"{Q_PROJ}_scale_inv", np.float32, ml_dtypes.float8_e4m3fn, "float8 or int8 with scales"),
      ("model.layers.0.mlp.gate_up_proj_blocks", np.uint8, None, "MXFP4"),
      (Q_PROJ.replace("weight", "scales"), np.float32, np.uint32, "MLX or AWQ"),
    ]
  ),
  *(
    tensor_row(
      f"weights of {np.dtype(dtype)}",
      "gpt2",
      lambda x, dtype=dtype: x | {LAYER: x[LAYER].astype(dtype)},
      f"{LAYER} is of {name}",
      "quantized or cast",
    )
    for dtype, name in [
      (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
      (ml_dtypes.float8_e5m2, "F8_E5M2"),
      (np.int8, "I8"),
      (np.int64, "I64"),
      (np.bool_, "BOOL"),
    ]
  ),
  # Wrapped, renamed, and other models
  tensor_row(
    "PEFT's base_layer",
    "llama",
    renamed(lambda name: name.replace("q_proj.", "q_proj.base_layer.")),
    "PEFT's wrappers",
    "base_layer",
    "merge_and_unload",
  ),
  tensor_row(
    "names of torch.compile",
    "llama",
    renamed(lambda name: f"_orig_mod.{name}"),
    "begin with '_orig_mod.'",
    "save_pretrained",
  ),
  tensor_row(
    "a model without a head",
    "llama",
    lambda x: {
      key.removeprefix("model."): value for key, value in x.items() if key != "lm_head.weight"
    },
    "lack the prefix 'model.'",
  ),
  tensor_row(
    "a part of a larger model",
    "llama",
    renamed(lambda name: f"language_model.{name}"),
    "begin with 'language_model.'",
  ),
  tensor_row(
    "Meta's names",
    "llama",
    lambda x: {"tok_embeddings.weight": x["model.embed_tokens.weight"]},
    "tok_embeddings.weight is a name of Meta's original format",
  ),
  tensor_row(
    "a classifier",
    "gpt2",
    lambda x: x | {"score.weight": np.zeros((2, 32), np.float32)},
    "score.weight belongs to the head of another task",
  ),
  tensor_row(
    "a model for rewards",
    "llama",
    lambda x: x | {"v_head.summary.weight": np.zeros((1, 32), np.float32)},
    "v_head.summary.weight belongs to the head of another task",
  ),
  tensor_row(
    "a head for questions",
    "bert",
    lambda x: x | {"qa_outputs.weight": np.zeros((2, 16), np.float32)},
    "qa_outputs.weight belongs to the head of another task",
  ),
  tensor_row(
    "layers of a deeper model",
    "llama",
    lambda x: x | {"model.layers.6.input_layernorm.weight": np.zeros(32, np.float32)},
    "num_hidden_layers is 2",
    "have 7 layers, layers.0 to layers.6",
  ),
  tensor_row("no tensors", "gpt2", lambda x: {}, "missing transformer.wte.weight (64, 32)"),
]

ONE_INDEX = json.dumps({"weight_map": {EMBED: "model-00001-of-00002.safetensors"}})
MISSING = FileNotFoundError
FILES = [
  # Foreign formats
  files_row(
    "a PEFT adapter", {"config.json": "", "adapter_config.json": "{}"}, "PEFT", error=MISSING
  ),
  files_row("GGUF alone", {"config.json": "", "m.gguf": "GGUF"}, "give the file", error=MISSING),
  files_row("GGUF", {"m.gguf": "GGUF"}, "weights are missing", "give the file", error=MISSING),
  files_row("pickles", {"pytorch_model.bin": b"\x80"}, "pickles", "save_pretrained", error=MISSING),
  files_row("TensorFlow", {"tf_model.h5": "x"}, "TensorFlow", error=MISSING),
  files_row("msgpack", {"flax_model.msgpack": "x"}, "msgpack", error=MISSING),
  files_row("MLX", {"weights.00.npz": "x"}, "MLX", error=MISSING),
  files_row("ONNX", {"model.onnx": "x"}, "ONNX", error=MISSING),
  files_row(
    "Meta's",
    {"config.json": "", "params.json": "{}", "consolidated.00.pth": "x"},
    "Meta's",
    error=MISSING,
  ),
  files_row("Mistral's", {"consolidated.safetensors": "x"}, "original format", error=MISSING),
  files_row(
    "sentence-transformers",
    {"config.json": "", "modules.json": "[]", "0_Transformer/config.json": "{}"},
    "sentence-transformers",
    error=MISSING,
  ),
  files_row("Orbax", {"config.json": "", "_METADATA": "{}"}, "Orbax", error=MISSING),
  files_row("diffusers", {"config.json": "", "model_index.json": "{}"}, "diffusers", error=MISSING),
  files_row(
    "a hub cache", {"config.json": "", "snapshots/abc/config.json": "{}"}, "cache", error=MISSING
  ),
  files_row(
    "a folder above",
    {"config.json": "", "inner/config.json": "{}"},
    "inner: did you mean",
    error=MISSING,
  ),
  files_row("a run", {"config.json": '{"seed": 0}', "metrics.jsonl": "{}"}, "folder of a run"),
  files_row("nothing", {"config.json": ""}, "config.json does not exist", error=MISSING),
  # config.json and the index
  files_row("config a list", {"config.json": "[]"}, "expected a JSON object"),
  files_row("config cut", {"config.json": '{"model_type": "gp'}, "config.json is not JSON"),
  files_row("config binary", {"config.json": b"\xff\xfe"}, "not text in UTF-8"),
  files_row("config deep", {"config.json": "[" * 100_000}, "nested too deeply"),
  files_row("config twice", {"config.json": '{"n_layer": 1, "n_layer": 2}'}, "n_layer", "twice"),
  files_row("no index", {"model-00001-of-00002.safetensors": "x"}, "index.json", error=MISSING),
  files_row("another name", {"weights.safetensors": "x"}, "rename them", error=MISSING),
  files_row("a shard is missing", {INDEX: ONE_INDEX}, "does not exist", "names it", error=MISSING),
  files_row("an empty index", {INDEX: '{"weight_map": {}}'}, "'weight_map' of file names"),
  *(
    files_row(
      f"index with {name!r}", {INDEX: json.dumps({"weight_map": {EMBED: name}})}, repr(name)
    )
    for name in ("../model.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "x.bin", "")
  ),
  # The safetensors file
  files_row("git-lfs", {WEIGHTS: "version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
  files_row("a page", {WEIGHTS: "<!DOCTYPE html><html></html>"}, "HTML"),
  files_row("a renamed pickle", {WEIGHTS: b"PK\x03\x04" + bytes(64)}, "a pickle of torch.save"),
  files_row("a renamed GGUF", {WEIGHTS: b"GGUF" + bytes(64)}, "GGUF"),
  *(
    files_row(f"safetensors with {title}", {WEIGHTS: content}, "not a safetensors file", WEIGHTS)
    for title, content in {
      "7 bytes": bytes(7),
      "a header of 10^18 bytes": file_of({"a": PAIR}, size=10**18),
      "a header of 2^64 - 1 bytes": file_of({"a": PAIR}, size=2**64 - 1),
      "a header beyond its end": file_of({"a": PAIR}, size=10**6),
      "a header of a list": file_of([1]),
      "a header cut": file_of(b'{"a":'),
      "a header not in UTF-8": file_of(b'{"\xff": 1}'),
      "a deep header": file_of(b"[" * 100_000),
      "overlapping tensors": file_of({"a": PAIR, "b": PAIR}, bytes(8)),
      "offsets beyond its end": file_of({"a": PAIR | {"data_offsets": [0, 10**18]}}),
      "offsets backwards": file_of({"a": PAIR | {"data_offsets": [8, 0]}}),
      "bytes of no tensor": file_of({"a": PAIR}),
      "another dtype": file_of({"a": PAIR | {"dtype": "F33"}, "b": SECOND}),
      "a negative shape": file_of({"a": PAIR | {"shape": [-2]}, "b": SECOND}),
      "a shape of 2^80": file_of({"a": PAIR | {"shape": [2**40, 2**40]}, "b": SECOND}),
      "a shape of fractions": file_of({"a": PAIR | {"shape": [2.0]}, "b": SECOND}),
      "metadata of numbers": file_of({"__metadata__": {"a": 5}, "a": PAIR, "b": SECOND}),
    }.items()
  ),
  files_row(
    "safetensors with a name twice",
    {WEIGHTS: file_of(b'{"a": %b, "a": %b}' % ((json.dumps(PAIR).encode(),) * 2), bytes(8))},
    "'a' occurs twice",
  ),
]

NAMES = [
  name_row("gs://bucket/model", "gs:// address", "local path"),
  name_row("s3://bucket/model", "s3:// address", load=load_causal_lm),
  name_row("gs://bucket/model", "gs:// address", load=plan_causal_lm),
  name_row("gs://bucket/model", "gs:// address", load=load_gpt2),
  name_row("abfs://bucket/model", "abfs:// address", load=load_llama),
  name_row("s3://bucket/model", "s3:// address", load=load_bert),
  name_row("s3://bucket/model", "s3:// address", load=load_deberta),
  name_row(Path("gs://bucket/model"), "gs:// address"),
  name_row("hf://openai-community/gpt2", "repository's name, 'openai-community/gpt2'"),
  name_row("https://huggingface.co/openai-community/gpt2", "'openai-community/gpt2'"),
  name_row("https://example.com/model.gguf", "https:// address"),
  name_row("", "a folder or a hub repository, got ''"),
  name_row(" ", "a folder or a hub repository, got ' '"),
  name_row(None, "a folder or a hub repository, got None"),
  name_row(5, "a folder or a hub repository, got 5"),
  name_row(str(FOLDERS["gpt2"] / WEIGHTS), "is a file; expected a GGUF file, or a folder"),
  BadInput("a fifo for a GGUF file", load_fifo, ("a fifo, a socket or a device, expected a file",)),
  BadInput(
    "a bucket to write to", lambda _: new_folder("gs://bucket/new").__enter__(), ("gs:// address",)
  ),
  BadInput("a language model for load_bert", lambda _: load_bert(FOLDERS["gpt2"]), ("'gpt2'",)),
  BadInput(
    "an encoder for load_causal_lm",
    lambda _: load_causal_lm(FOLDERS["bert"]),
    ("bert is an encoder", "experiments.glue"),
  ),
]

ROWS = [*CONFIGS, *BUILT, *TENSORS, *FILES, *NAMES]
