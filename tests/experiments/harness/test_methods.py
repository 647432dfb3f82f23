"""The table of methods: a row's effects, and that no other code has their names."""

import ast
import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from experiments import finetune, glue, gpt2_e2e
from experiments.classification.config import GlueConfig
from experiments.configs import e2e_budgets
from experiments.configs import finetune as finetune_configs
from experiments.configs import glue as glue_configs
from experiments.configs import gpt2_e2e as e2e_configs
from experiments.harness import methods
from experiments.harness.config import read_config, replace_fields
from experiments.harness.launch import apply, settle, single_run, sweep_runs
from experiments.harness.methods import (
  METHODS,
  adapt,
  check_used,
  exported_adapter,
  lora_config,
)
from experiments.harness.workdir import open_workdir, stored_config, write_json
from experiments.nlg.config import E2EConfig, FinetuneConfig
from lora_jax.models.bert.model import Bert, BertConfig
from lora_jax.models.deberta.model import Deberta, DebertaConfig
from lora_jax.models.gpt2.model import GPT2, GPT2Config
from lora_jax.models.llama.model import Llama, LlamaConfig
from lora_jax.models.parts.mixture import MixtureConfig
from lora_jax.trees import leaves_with_path, matches

from tests.paths import ROOT
from tests.tiny_e2e import tiny_config
from tests.tiny_glue_run import tiny_config as tiny_glue


def compared_names(source):
  """Returns the names of methods that a file compares with something, or looks up."""
  result = []
  for node in ast.walk(ast.parse(source)):
    parts = []
    if isinstance(node, ast.Compare):
      parts = [node.left, *node.comparators]
    elif isinstance(node, ast.Dict):
      parts = [key for key in node.keys if key is not None]
    elif isinstance(node, ast.MatchValue):
      parts = [node.value]
    constants = [part for root in parts for part in ast.walk(root)]
    result += [x.value for x in constants if isinstance(x, ast.Constant) and x.value in METHODS]
  return result


def test_methods_are_compared_by_name_nowhere_else():
  table = ROOT / "experiments" / "harness" / "methods.py"
  assert set(compared_names(table.read_text())) == set(METHODS)
  for path in sorted((ROOT / "experiments").rglob("*.py")):
    if path != table:
      assert not compared_names(path.read_text()), path


@pytest.mark.parametrize(
  "line",
  [
    'x = config.method == "lora"',
    'x = method in ("lora", "other")',
    'x = {"full_finetuning": 1}',
    'match x:\n  case "head_only":\n    pass',
  ],
)
def test_the_rule_sees_each_way_to_compare(line):
  assert compared_names(line)


def test_experiments_know_their_methods():
  assert set(methods.names("finetune")) < set(methods.names("gpt2_e2e"))
  assert {"lora", "full_finetuning"} <= set(methods.names("finetune"))
  assert "head_only" in methods.names("glue")
  assert "frozen_base" in methods.names("gpt2_e2e")
  for experiment in ("glue", "finetune"):
    assert "frozen_base" not in methods.names(experiment)


@pytest.mark.parametrize("name", ["rslora", "frozen_base", "template"])
def test_an_unknown_method_is_refused(name, tmp_path):
  message = f"method must be one of lora, .*full_finetuning.*, got '{name}'"
  changes = {"method": name}
  runs = [
    (glue.run, tiny_glue(tmp_path)),
    (finetune.run, finetune_configs.get_config()),
    (finetune.plan, finetune_configs.get_config()),
  ]
  if name != "frozen_base":
    runs.append((gpt2_e2e.run, tiny_config(tmp_path)))
  for run, config in runs:
    with pytest.raises(ValueError, match=message):
      run(apply(config, changes))


def test_a_method_that_trains_nothing_is_not_full_finetuning(tmp_path):
  config = read_config(E2EConfig, apply(tiny_config(tmp_path), {"method": "frozen_base"}))
  with pytest.raises(
    ValueError, match=r"method=frozen_base trains nothing; expected one of lora, .*full_finetuning"
  ):
    adapt(config)


def test_a_field_that_is_ignored():
  message = r"lora\.rank=8 has no effect with method=full_finetuning: leave it out, .*: lora"
  with pytest.raises(ValueError, match=message):
    check_used("full_finetuning", {"seed": 1, "lora.rank": 8}, "glue")
  with pytest.raises(ValueError, match=r"lora\.start='runs' has no effect with method=head_only"):
    check_used("head_only", {"lora.start": "runs"}, "glue")
  for method in ("pissa", "olora", "milora", "lora_xs", "loftq"):
    with pytest.raises(ValueError, match=r"lora\.init='normal' has no effect with method="):
      check_used(method, {"lora.init": "normal"}, "gpt2_e2e")
  check_used("lora", {"lora.rank": 8, "optimizer.learning_rate": 1.0}, "gpt2_e2e")
  changed = {"optimizer.learning_rate": 1.0, "data.num_epochs": 2}
  check_used("full_finetuning", changed, "gpt2_e2e")
  with pytest.raises(ValueError, match=r"that uses it: lora, .*full_finetuning") as raised:
    check_used("frozen_base", {"optimizer.b1": 0.5}, "gpt2_e2e")
  assert "head_only" not in str(raised.value)  # which gpt2_e2e lacks


def test_a_single_run_refuses_what_is_ignored_and_takes_what_is_the_default():
  default = e2e_configs.get_config()
  changed = apply(default, {"method": "full_finetuning", "lora.rank": 8})
  with pytest.raises(ValueError, match="has no effect"):
    single_run(changed, default, {"method", "lora.rank"})
  same = apply(default, {"method": "full_finetuning", "lora.rank": 16})
  assert single_run(same, default, {"method", "lora.rank"}).method == "full_finetuning"


@pytest.mark.parametrize(
  ("default", "changes", "rate"),
  [
    (e2e_configs.get_config(), {"method": "full_finetuning"}, 1e-3),
    (e2e_configs.get_config(), {}, 1e-2),
    (e2e_configs.get_config("medium"), {"method": "full_finetuning"}, 2e-5),
    (glue_configs.get_config(), {"method": "head_only"}, 1e-3),
    (finetune_configs.get_config(), {"method": "full_finetuning"}, 2e-5),
    # a file of full fine-tuning: LoRA takes ten times its learning rate
    (apply(e2e_configs.get_config(), {"method": "full_finetuning"}), {"method": "lora"}, 1e-1),
  ],
)
def test_the_default_learning_rate_is_the_methods(default, changes, rate, capsys):
  config, changed = settle(apply(default, changes), default, changes.keys())
  assert config.optimizer.learning_rate == rate
  assert changed == changes
  single_run(apply(default, changes), default, changes.keys())
  printed = capsys.readouterr().out
  assert printed.count(f"optimizer.learning_rate={rate:g}, the default for ") == (
    rate != default.optimizer.learning_rate
  )
  named = {**changes, "optimizer.learning_rate": 0.5}
  config, changed = settle(apply(default, named), default, named.keys())
  assert config.optimizer.learning_rate == 0.5
  assert changed == named


def test_each_method_of_a_sweep_has_its_learning_rate(capsys):
  default = e2e_configs.get_config()
  changes = [{"method": "lora"}, {"method": "full_finetuning"}, {"seed": 1}]
  module = SimpleNamespace(sweep=lambda config: changes)
  full = apply(default, {"method": "full_finetuning"})
  runs = sweep_runs(module, full, default, {"method"})
  assert [run.optimizer.learning_rate for run in runs] == [1e-2, 1e-3, 1e-3]
  line = "optimizer.learning_rate=0.001, the default for full fine-tuning\n"
  assert capsys.readouterr().out == line


def test_a_trained_folder_keeps_the_learning_rate_of_its_time(tmp_path, capsys):
  """Older runs have the config file's learning rate, whatever their method."""
  default = e2e_configs.get_config()
  full = apply(default, {"method": "full_finetuning", "workdir": str(tmp_path / "seed=1")})
  with open_workdir(read_config(E2EConfig, full)) as workdir:
    pass
  assert json.loads((workdir / "config.json").read_text())["optimizer"]["learning_rate"] == 1e-2
  assert single_run(full, default, {"method"}).optimizer.learning_rate == 1e-3  # nothing is trained
  (workdir / "checkpoints").mkdir()
  capsys.readouterr()
  run = single_run(full, default, {"method"})
  assert run.optimizer.learning_rate == 1e-2
  assert f"optimizer.learning_rate=0.01, with which {workdir} was" in capsys.readouterr().out
  with open_workdir(read_config(E2EConfig, run)):
    pass
  module = SimpleNamespace(sweep=lambda config: [{"seed": 1}, {"seed": 2}])
  sweep = apply(full, {"workdir": str(tmp_path)})
  runs = sweep_runs(module, sweep, default, {"method"})
  assert [run.optimizer.learning_rate for run in runs] == [1e-2, 1e-3]
  named = apply(full, {"optimizer.learning_rate": 1e-3})
  run = single_run(named, default, {"method", "optimizer.learning_rate"})
  message = r"another config: optimizer\.learning_rate=0\.01 there, 0\.001 now"
  with pytest.raises(ValueError, match=message), open_workdir(read_config(E2EConfig, run)):
    pass
  dora = single_run(apply(full, {"method": "dora"}), default, {"method"})
  with (
    pytest.raises(ValueError, match="another config: method="),
    open_workdir(read_config(E2EConfig, dora)),
  ):
    pass


def test_all_linear_is_the_pattern_that_it_stands_for(tmp_path):
  config = read_config(FinetuneConfig, finetune_configs.get_config())
  config = replace_fields(config, {"workdir": str(tmp_path)})
  assert replace_fields(config, {"lora.target": "all-linear"}) == config
  with open_workdir(config) as workdir:
    (workdir / "checkpoints").mkdir()
  stored = json.loads((workdir / "config.json").read_text())
  stored["lora"]["target"] = "all-linear"  # as it once was stored
  write_json(workdir / "config.json", stored)
  assert stored_config(workdir)["lora"]["target"] == config.lora.target
  with open_workdir(config):
    pass


@pytest.mark.parametrize(
  "module_and_config",
  [
    (e2e_configs, e2e_configs.get_config("medium")),
    (e2e_budgets, e2e_budgets.get_config("rates")),
    (e2e_budgets, e2e_budgets.get_config("seeds")),
    (finetune_configs, finetune_configs.get_config()),
    (glue_configs, glue_configs.get_config("roberta_base,cola")),
    (glue_configs, apply(glue_configs.get_config(), {"data.tuning": True})),
  ],
  ids=lambda pair: f"{pair[0].__name__}:{pair[1].variant}",
)
def test_the_shipped_sweeps_change_nothing_that_is_ignored(module_and_config):
  module, config = module_and_config
  runs = sweep_runs(module, config, config, ())
  assert len({run.workdir for run in runs}) == len(runs) > 3


def test_sweeps_try_each_methods_own_learning_rates():
  config = apply(glue_configs.get_config(), {"data.tuning": True})
  tried = {}
  for run in sweep_runs(glue_configs, config, config, ()):
    tried.setdefault(run.method, []).append(run.optimizer.learning_rate)
  assert tried["full_finetuning"] == [3e-5, 1e-4, 3e-4]
  assert tried["lora"] == tried["dora"] == tried["head_only"] == [1e-3, 3e-3, 1e-2]
  assert list(tried) == methods.names("glue")
  config = finetune_configs.get_config()
  rates = [run.optimizer.learning_rate for run in sweep_runs(finetune_configs, config, config, ())]
  assert rates == [6e-5, 2e-4, 6e-4, 2e-3]
  full = apply(config, {"method": "full_finetuning"})
  rates = [r.optimizer.learning_rate for r in sweep_runs(finetune_configs, full, config, "method")]
  assert rates == [6e-6, 2e-5, 6e-5, 2e-4]


def test_the_config_of_lora_is_the_sections():
  config = read_config(GlueConfig, glue_configs.get_config())
  expected = dataclasses.asdict(config.lora)
  del expected["start"]
  assert lora_config(config) == lj.LoraConfig(**expected, extra=r"(pooler|head)/.*")
  dora = replace_fields(config, {"method": "dora"})
  assert lora_config(dora) == dataclasses.replace(lora_config(config), variant=lj.DORA)
  assert lora_config(read_config(E2EConfig, e2e_configs.get_config())).extra == ()


SHAPE = {"vocab_size": 64, "num_positions": 16, "embed_dim": 8, "num_layers": 2, "num_heads": 2}
LLAMA = {**SHAPE, "num_kv_heads": 1, "mlp_dim": 16}
MIXTURE = MixtureConfig(num_experts=4, experts_per_token=2, shared_dim=16)
DECODER = r".*/(attn/(query|key|value|out)|mlp/(up|down))/kernel"  # the default of gpt2_e2e
ANY_DECODER = r".*/(attn/(query|key|value|out)|mlp/(shared/)?(gate|up|down))/kernel"  # of finetune
MODELS = {
  "gpt2": (GPT2(GPT2Config(**SHAPE)), DECODER),
  "gpt2_scanned": (GPT2(GPT2Config(**SHAPE, scan_layers=True)), DECODER),
  "llama": (Llama(LlamaConfig(**LLAMA)), ANY_DECODER),
  "mixture": (Llama(LlamaConfig(**LLAMA, mixture=MIXTURE)), ANY_DECODER),
  "bert": (Bert(BertConfig(**SHAPE, mlp_dim=16)), DECODER),
  "deberta": (Deberta(DebertaConfig(**SHAPE, mlp_dim=16, num_buckets=8)), DECODER),
}
NOT_LINEAR_LAYERS = "router|experts|shared_gate|head|pooler|embedding"


@pytest.mark.parametrize("family", MODELS)
def test_all_linear_are_the_linear_layers_of_the_blocks(family):
  module, pattern = MODELS[family]
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
  config = read_config(FinetuneConfig, finetune_configs.get_config())
  config = replace_fields(config, {"lora.target": "all-linear", "lora.rank": 2})
  target = lora_config(config).target
  assert isinstance(target, str)
  paths = [path for path, _ in leaves_with_path(params)]
  chosen = [path for path in paths if matches(target, path)]
  assert chosen == [path for path in paths if matches(pattern, path)]
  kernels = [path for path in paths if path.endswith("/kernel")]
  left_out = [path for path in kernels if path not in chosen]
  assert all(matches(f".*({NOT_LINEAR_LAYERS}).*", path) for path in left_out), left_out
  per_layer = {"gpt2_scanned": 6, "llama": 14, "mixture": 14}.get(family, 12)
  assert len(chosen) == per_layer


def test_the_embedded_runs_default_is_all_linear():
  config = read_config(E2EConfig, e2e_configs.get_config())
  assert config.lora.target == DECODER
  assert read_config(FinetuneConfig, finetune_configs.get_config()).lora.target == ANY_DECODER


@pytest.mark.parametrize(("method", "is_plain"), [("vera", True), ("hira", False)])
def test_adapters_that_are_plain_lora_are_exported_as_that(method, is_plain):
  """PEFT has a method of its own for both; servers read plain LoRA, which HiRA is not."""
  changes = {"method": method, "lora.rank": 2, "lora.target": "kernel"}
  config = read_config(E2EConfig, apply(e2e_configs.get_config("mini"), changes))
  fn, params = (lambda params, x: x @ params["kernel"]), {"kernel": jnp.eye(4, 6)}
  trained = lj.lora(fn, lora_config(config)).init(jax.random.key(0), params, jnp.ones((1, 4)))
  lora, exported = exported_adapter(config, trained, params)
  assert (lora.variant is None) == is_plain
  assert list(exported) == ["kernel"] if is_plain else exported is trained


def in_turn(params, x):
  """Applies layers of weights one after another."""
  for layer in params.values():
    x = x @ layer["query"]["kernel"]
  return x


def scanned(params, x):
  return jax.lax.scan(lambda x, w: (x @ w, None), x, params["h"]["query"]["kernel"])[0]


@pytest.mark.parametrize("fn", [in_turn, scanned])
def test_copied_blocks_start_with_one_a_for_all_layers(tmp_path, fn):
  config = read_config(E2EConfig, tiny_config(tmp_path))
  names, shape = (("h",), (2, 8, 8)) if fn is scanned else (("h_0", "h_1"), (8, 8))
  params = {name: {"query": {"kernel": jax.ShapeDtypeStruct(shape, "float32")}} for name in names}

  def factors(init):
    fields = {"lora.init": init, "lora.target": ".*/query/kernel", "lora.rank": 2}
    x = jax.ShapeDtypeStruct((1, 8), "float32")
    tree = adapt(replace_fields(config, fields))(fn).init(jax.random.key(0), params, x)
    pairs = [(node.lora_a, node.lora_b) for node in (tree[n]["query"]["kernel"] for n in names)]
    if fn is scanned:
      (pair,) = pairs
      return [np.asarray(array) for array in pair]
    return [np.stack(arrays) for arrays in zip(*pairs, strict=True)]

  a, b = factors("copied_blocks")
  assert a.shape == b.swapaxes(1, 2).shape == (2, 8, 2)
  np.testing.assert_array_equal(a[0], a[1])
  assert a.std() > 0
  assert not b.any()
  other, _ = factors("kaiming_uniform")
  assert (other[0] != other[1]).all()


def test_copied_blocks_are_for_lora_only(tmp_path):
  config = read_config(E2EConfig, tiny_config(tmp_path))
  config = replace_fields(config, {"lora.init": "copied_blocks", "method": "dora"})
  with pytest.raises(ValueError, match=r"lora\.init=copied_blocks is for method=lora, and"):
    adapt(config)
