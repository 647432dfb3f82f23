"""Hugging Face folders are read strictly, written completely, and loaded part by part."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax.models.checkpoints import hub
from lora_jax.models.checkpoints.hub import Tensors, find_folder
from lora_jax.models.gpt2.folder import load_gpt2, params_shapes, save_gpt2
from lora_jax.models.zoo import load_causal_lm

from tests.make_gpt2_golden import GOLDEN

EMBEDDED = Path(lora_jax.__file__).parent / "assets" / "gpt2"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
  return Path(shutil.copytree(GOLDEN / "tied", tmp_path / "model"))


def change(folder, changes):
  """Rewrites the weights; None removes a tensor."""
  tensors = load_file(folder / WEIGHTS) | changes
  save_file({name: x for name, x in tensors.items() if x is not None}, folder / WEIGHTS)


def set_config(folder, **values):
  config = json.loads((folder / "config.json").read_text()) | values
  fields = {key: value for key, value in config.items() if value != "absent"}
  (folder / "config.json").write_text(json.dumps(fields))


def shards(folder):
  """Splits the folder's weights into several files; returns the index."""
  config, params = load_gpt2(folder)
  shutil.rmtree(folder)
  save_gpt2(folder, config, params, max_shard_bytes=40_000)
  return json.loads((folder / INDEX).read_text())


def refused(folder, message, error=ValueError, **options):
  with pytest.raises(error, match=message):
    load_gpt2(folder, **options)


@pytest.mark.parametrize(
  ("name", "tensor", "message"),
  [
    ("h.1.ln_2.bias", None, r"missing transformer\.h\.1\.ln_2\.bias \(32,\)"),
    ("h.1.ln_3.bias", np.zeros(32), r"unexpected transformer\.h\.1\.ln_3\.bias \(32,\)"),
    ("h.2.ln_2.bias", np.zeros(32), r"n_layer is 2 .* but the weights have 3 layers, h\.0 to h\.2"),
    ("h.0.mlp.c_fc.weight", np.zeros((128, 32)), r"has shape \(128, 32\), expected \(32, 128\)"),
    ("wpe.weight", np.zeros((24, 32), np.int8), r"wpe\.weight is of I8, expected one of F64, F32"),
  ],
)
def test_tensors_other_than_the_configs_are_named(folder, name, tensor, message):
  change(folder, {f"transformer.{name}": tensor})
  refused(folder, message)


def test_every_fault_is_named_at_once(folder):
  change(folder, {"transformer.ln_f.bias": None, "more": np.zeros(3)})
  refused(folder, r"missing transformer\.ln_f\.bias \(32,\); unexpected more \(3,\)$")


@pytest.mark.parametrize("size", [100_000, 1_000, 3, 0])
def test_truncated_weights_are_refused(folder, size):
  os.truncate(folder / WEIGHTS, size)
  refused(folder, "model.safetensors is truncated or not a safetensors file")


class Trap:
  """Creates a file when unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return Path.touch, (self.path,)


def test_a_pickle_is_named_and_never_opened(folder, tmp_path):
  import pickle

  (folder / WEIGHTS).unlink()
  (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
  refused(folder, r"weights are missing; pytorch_model\.bin may be pickles", FileNotFoundError)
  (folder / "pytorch_model.bin").rename(folder / WEIGHTS)
  refused(folder, "model.safetensors is not a safetensors file but a pickle")
  assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
  "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin"]
)
def test_an_index_cannot_point_out_of_its_folder(folder, name):
  index = shards(folder)
  index["weight_map"]["transformer.wte.weight"] = name
  (folder / INDEX).write_text(json.dumps(index))
  refused(folder, f"'{name}' is not the name of a safetensors file of the folder")


def test_wrong_indices_are_refused(folder):
  index = shards(folder)
  first, *_, last = sorted(set(index["weight_map"].values()))
  (folder / last).rename(folder / "away")
  refused(folder, f"{last} does not exist, but .*index.json names it", FileNotFoundError)
  (folder / "away").rename(folder / last)

  moved = dict(index["weight_map"], **{"transformer.wte.weight": last})
  assert index["weight_map"]["transformer.wte.weight"] == first
  (folder / INDEX).write_text(json.dumps({"weight_map": moved}))
  refused(folder, r"and the files disagree about transformer\.wte\.weight$")

  shutil.copy(folder / first, folder / "twice.safetensors")
  more = index["weight_map"] | {"x": "twice.safetensors"}
  (folder / INDEX).write_text(json.dumps({"weight_map": more}))
  refused(folder, f"is in {first} and in twice.safetensors")

  for wrong in (json.dumps({"weight_map": [1]}), json.dumps({"weight_map": {"x": 1}}), "{}"):
    (folder / INDEX).write_text(wrong)
    refused(folder, "expected an object 'weight_map' of file names")


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"model_type": "llama"}, "expected model_type gpt2, got 'llama'"),
    ({"model_type": "absent"}, "expected model_type gpt2, got None"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False is not supported; expected True"),
    ({"scale_attn_by_inverse_layer_idx": True}, "layer_idx=True is not supported"),
    ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
    (
      {"activation_function": "mish"},
      "config.json: activation_function must be one of .* got 'mish'",
    ),
    ({"n_layer": "absent"}, "config.json: missing n_layer"),
    ({"n_layer": "2"}, "n_layer must be an integer, got '2'"),
    ({"n_inner": 0}, "n_inner must be an integer in .*, got 0"),
    ({"n_head": 5}, "config.json: num_heads must divide embed_dim"),
  ],
)
def test_configs_that_are_computed_otherwise_are_refused(folder, values, message):
  set_config(folder, **values)
  refused(folder, message)


def test_broken_and_missing_configs_are_refused(folder):
  (folder / "config.json").write_text("{")
  refused(folder, "config.json is not JSON")
  (folder / "config.json").write_text("[]")
  refused(folder, "expected a JSON object, got list")
  (folder / "config.json").unlink()
  refused(folder, "config.json does not exist", FileNotFoundError)
  refused(folder / "none", "is not a folder", FileNotFoundError)


def test_a_stored_head_must_be_the_tied_embedding(folder):
  expected = load_gpt2(folder)[1]
  embedding = load_file(folder / WEIGHTS)["transformer.wte.weight"]
  for dtype in ("float32", "float64"):
    change(folder, {"lm_head.weight": embedding.astype(dtype)})
    assert_same_trees(load_gpt2(folder)[1], expected)
  change(folder, {"lm_head.weight": embedding + 1e-3})
  refused(
    folder, r"lm_head\.weight .* differs from transformer\.wte\.weight .*_embeddings to false"
  )


def test_the_remedies_for_resized_rows_and_missing_heads_work(folder):
  table = load_file(folder / WEIGHTS)["transformer.wte.weight"]
  change(folder, {"transformer.wte.weight": np.resize(table, (67, 32))})
  refused(folder, "Set vocab_size to 67 in config.json")
  set_config(folder, vocab_size=67)
  expected = load_gpt2(folder)[1]
  set_config(folder, tie_word_embeddings=False)
  refused(folder, "Set tie_word_embeddings to true if it is")
  change(folder, {"lm_head.weight": np.resize(table, (67, 32))})
  assert load_gpt2(folder)[0].tie_head is False
  change(folder, {"lm_head.weight": None})
  set_config(folder, tie_word_embeddings=True)
  assert_same_trees(load_gpt2(folder)[1], expected)


def test_old_files_have_no_prefix_and_hold_masks(folder):
  expected = load_gpt2(folder)[1]
  tensors = {k.removeprefix("transformer."): x for k, x in load_file(folder / WEIGHTS).items()}
  for i in range(2):
    tensors[f"h.{i}.attn.bias"] = np.tri(24, dtype=np.float32)[None, None]
    tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
  save_file(tensors, folder / WEIGHTS)
  assert_same_trees(load_gpt2(folder)[1], expected)


FIND = """
import time
from lora_jax.models.checkpoints import hub
hub.HUB_TIMEOUT = 0.2
start = time.monotonic()
try:
  hub.find_folder("some-user/some-model")
except FileNotFoundError as error:
  print(time.monotonic() - start, error)
"""


@pytest.mark.parametrize("network", ["closed", "silent", "offline"])
def test_a_hub_name_without_network_fails_soon(network, tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls and never answers
    port = silent.getsockname()[1] if network == "silent" else 9
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path)}
    env |= {"HF_HUB_OFFLINE": "1"} if network == "offline" else {}
    command = [sys.executable, "-c", FIND]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
  seconds, message = run.stdout.split(" ", 1)
  assert float(seconds) < 30  # on an idle machine at most about a second
  assert "'some-user/some-model' is not a local folder and could not be downloaded" in message
  assert "Give the path of a folder with config.json" in message
  assert ("HF_HUB_OFFLINE" in message) == (network == "offline")


def test_a_misspelled_name_of_a_model_has_a_suggestion(monkeypatch):
  def fail(*_):
    raise OSError("no such repository")

  monkeypatch.setattr(hub, "_from_hub", fail)
  with pytest.raises(FileNotFoundError, match=r"repository\)\. Did you mean smollm2\? Give"):
    find_folder("SmolLM")


def test_a_folder_may_be_named_as_a_gguf_file(folder, tmp_path):
  renamed = folder.rename(tmp_path / "model.gguf")
  assert_same_trees(load_causal_lm(renamed).params, load_gpt2(renamed)[1])


class Hub(http.server.BaseHTTPRequestHandler):
  """Serves the files of a folder as the hub's repository `user/tied`."""

  folder: Path
  commit = "0123456789abcdef0123456789abcdef01234567"
  refuses_with: int | None = None  # a status

  def do_GET(self):
    if self.refuses_with:
      self.send_error(self.refuses_with)
      return
    parts = self.path.split("?")[0].split("/")
    if parts[1:3] == ["api", "models"]:
      names = sorted(path.name for path in self.folder.iterdir())
      answer = {
        "id": "user/tied",
        "sha": self.commit,
        "siblings": [{"rfilename": name} for name in names],
      }
      if "tree" in parts:
        sizes = [(self.folder / name).stat().st_size for name in names]
        answer = [
          {"type": "file", "path": name, "size": size, "oid": f"{size:040}"}
          for name, size in zip(names, sizes, strict=True)
        ]
      body = json.dumps(answer).encode()
    elif not (self.folder / parts[-1]).is_file():
      self.send_error(404)
      return
    else:  # user/tied/resolve/<revision>/<name>
      body = (self.folder / parts[-1]).read_bytes()
    self.send_response(200)
    self.send_header("Content-Length", str(len(body)))
    self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
    self.send_header("X-Repo-Commit", self.commit)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body)

  do_HEAD = do_GET

  def log_message(self, format, *args):
    pass


ANSWER = """
import sys
from lora_jax.models.checkpoints.hub import find_folder
for line in sys.stdin:
  try:
    answer = str(find_folder("user/tied", weights=line.strip() == "weights"))
  except FileNotFoundError as error:
    answer = str(error).replace(chr(10), " ")
  print("ANSWER", answer, flush=True)
"""


@contextlib.contextmanager
def finder(**env):
  """Yields a function that finds the repository in a process with these variables."""
  with subprocess.Popen(
    [sys.executable, "-c", ANSWER],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    env=os.environ | env,
  ) as process:

    def find(kind="weights"):
      process.stdin.write(f"{kind}\n")
      process.stdin.flush()
      answers = (line for line in process.stdout if line.startswith("ANSWER "))
      return next(answers).removeprefix("ANSWER ").strip()

    try:
      yield find
    finally:
      process.stdin.close()


def test_a_repository_of_the_hub_and_later_without_network(folder, tmp_path):
  """Weights are downloaded on request; a downloaded repository is found offline."""
  (folder / "generation_config.json").write_text("{}")
  handler = type("OfFolder", (Hub,), {"folder": folder})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    with finder(**env, **endpoint) as online, finder(**env, HF_HUB_OFFLINE="1") as offline:
      planned = Path(online("plan"))
      assert not (planned / WEIGHTS).exists()
      assert "Give the path of a folder" in offline()
      downloaded = online()
      assert (Path(downloaded) / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
      assert (Path(downloaded) / "generation_config.json").is_file()
      assert offline() == downloaded
      handler.refuses_with = 503
      assert online() == downloaded
      handler.refuses_with = 401
      assert "Give the path of a folder" in online()
      handler.refuses_with = None
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with finder(**env | {"HF_HOME": str(tmp_path / "other")}, **endpoint) as elsewhere:
      message = elsewhere()
    assert "has no model.safetensors, but pytorch_model.bin; pickles are not read" in message
    server.shutdown()


def test_a_local_folder_is_taken_as_it_is(folder):
  assert find_folder(str(folder)) == folder


def assert_same_trees(got, expected):
  def same(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)

  jax.tree.map(same, got, expected)


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [20_000, 10**9])
def test_a_saved_folder_loads_bit_for_bit(tmp_path, name, scan_layers, max_shard_bytes):
  config, params = load_gpt2(GOLDEN / name, scan_layers=scan_layers)
  written_folder = tmp_path / "runs" / "new"
  save_gpt2(written_folder, config, params, max_shard_bytes=max_shard_bytes)
  reloaded, loaded = load_gpt2(written_folder, scan_layers=scan_layers)
  assert reloaded == config
  assert_same_trees(loaded, params)
  if max_shard_bytes == 10**9:
    assert_same_trees(load_file(written_folder / WEIGHTS), load_file(GOLDEN / name / WEIGHTS))
  assert (written_folder / INDEX).exists() == (max_shard_bytes < 10**9)
  assert {path.name for path in written_folder.parent.iterdir()} == {"new"}
  for path in written_folder.glob("*.safetensors"):
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(
      (written_folder / "config.json").stat().st_mode
    )


def test_bfloat16_is_kept_and_the_tokenizer_comes_with_it(tmp_path):
  config, params = load_gpt2(EMBEDDED, param_dtype="bfloat16")
  save_gpt2(tmp_path / "new", config, params, EMBEDDED, end_of_text_id=0)
  got, expected = load_file(tmp_path / "new" / WEIGHTS), load_file(EMBEDDED / WEIGHTS)
  assert got.keys() == expected.keys()
  assert_same_trees(got, expected)
  written = json.loads((tmp_path / "new" / "config.json").read_text())
  assert written == json.loads((EMBEDDED / "config.json").read_text()) | {"n_inner": None}
  same = (tmp_path / "new" / "tokenizer.json").read_bytes()
  assert same == (EMBEDDED / "tokenizer.json").read_bytes()


def test_what_cannot_be_saved_is_refused(folder, tmp_path):
  config, params = load_gpt2(folder)
  with pytest.raises(FileExistsError, match="exists; nothing is overwritten"):
    save_gpt2(folder, config, params)
  adapted = params | {"h_0": params["h_0"] | {"attn": params["h_0"]["attn"] | {"lora": {}}}}
  save_gpt2(tmp_path / "same", config, adapted)  # an empty branch holds no array
  del adapted["h_0"]["attn"]["key"]
  with pytest.raises(ValueError, match=r"expected \[\('h_0/attn/key/bias', \(32,\)\), .* got \[\]"):
    save_gpt2(tmp_path / "new", config, adapted)
  with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
    save_gpt2(tmp_path / "new", config, params, tokenizer_from=folder)
  assert {path.name for path in tmp_path.iterdir()} == {"model", "same"}


@pytest.mark.parametrize(("max_shard_bytes", "shard"), [(20_000, 2), (10**9, 1)])
def test_a_full_disk_leaves_nothing_behind(folder, tmp_path, max_shard_bytes, shard):
  config, params = load_gpt2(folder)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # The system itself refuses files this long: the real failure, halfway through the weights.
  resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, limits[1]))
  try:
    with pytest.raises(
      OSError, match=rf"could not write .*/{shard}\.safetensors: .*File too large"
    ):
      save_gpt2(tmp_path / "new", config, params, max_shard_bytes=max_shard_bytes)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_each_device_reads_its_own_part(monkeypatch, name, scan_layers):
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

  def shardings(shapes):
    specs = jax.tree.map(lambda x: P(*[None] * (len(x.shape) - 1), "fsdp"), shapes)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

  expected = load_gpt2(GOLDEN / name, scan_layers=scan_layers)[1]
  read, sizes = Tensors.read, []

  def spy(self, *args):
    part = read(self, *args)
    sizes.append(part.nbytes)
    return part

  monkeypatch.setattr(Tensors, "read", spy)
  config, params = load_gpt2(GOLDEN / name, scan_layers=scan_layers, shardings=shardings)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  for leaf in jax.tree.leaves(params):
    assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 8}
  assert sum(sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  layer = params_shapes(dataclasses.replace(config, scan_layers=False))
  assert max(sizes) == max(4 * leaf.size // 8 for leaf in jax.tree.leaves(layer))


def test_one_sharding_serves_all_leaves():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  replicated = NamedSharding(mesh, P())
  params = load_gpt2(GOLDEN / "tied", shardings=replicated)[1]
  assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {replicated}
  part = {"wte": replicated}
  with pytest.raises(ValueError, match="wpe"):
    load_gpt2(GOLDEN / "tied", shardings=part)


def test_weights_come_in_the_dtype_asked_for():
  wide = load_gpt2(EMBEDDED)[1]
  narrow = load_gpt2(EMBEDDED, param_dtype=jnp.bfloat16)[1]
  assert_same_trees(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), wide)
