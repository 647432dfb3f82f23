"""The benchmark of an epoch: lora_jax is timed, and PEFT gets exactly the same work."""

import importlib.util
import warnings

import numpy as np
import pytest

from benchmarks import e2e_epoch
from experiments.harness import flops
from lora_jax.data import batches, text
from lora_jax.models.gpt2.folder import load_gpt2

from tests.tiny_e2e import tiny_folder

SMALL = ["--lines", "12", "--rows", "2", "--row_length", "192", "--steps", "1", "--repeats", "1"]


def tiny_base(options):
  return e2e_epoch.Base(*load_gpt2(tiny_folder()))


@pytest.mark.parametrize(
  ("load_base", "num_layers", "embed_dim"),
  [
    pytest.param(tiny_base, 2, 32, id="tiny"),
    pytest.param(e2e_epoch.load_base, 6, 256, id="embedded", marks=pytest.mark.long),
  ],
)
def test_lora_jax_is_timed_where_the_peers_are_missing(
  load_base, num_layers, embed_dim, monkeypatch, capsys
):
  monkeypatch.setattr(e2e_epoch, "PEERS", ("no_such_package",))
  monkeypatch.setattr(e2e_epoch, "load_base", load_base)
  monkeypatch.setattr(flops, "matmul_flops", lambda repeats: 1e11)  # a second of all cores
  ways = e2e_epoch.main(SMALL)
  printed = capsys.readouterr().out
  assert "PEFT is left out; missing: no_such_package" in printed
  rows = [line for line in printed.splitlines() if "(1.00-1.00)" in line]
  assert any(row.startswith("lora_jax packed") for row in rows)  # padded may take as long
  assert list(ways) == ["lora_jax packed", "lora_jax padded"]
  shares = printed.partition("as a share of an epoch of\n")[2].splitlines()
  assert [line[:15] for line in shares] == ["lora_jax packed", "lora_jax padded"]
  packed, padded = ways.values()
  assert packed.first_loss == pytest.approx(padded.first_loss, rel=1e-5)
  inputs_and_outputs = (4 * 2 + 2 * 5) * embed_dim  # four square kernels, two of the MLP
  assert packed.trainer.num_trainable == num_layers * 16 * inputs_and_outputs
  tokens = [e2e_epoch.num_tokens_of(way.data) for way in ways.values()]
  assert tokens[0] == tokens[1] > 12 * 40  # the same examples, without padding


def test_matmuls_of_a_step_are_counted():
  params = {
    "wte": {"embedding": np.zeros((10, 4))},
    "wpe": {"embedding": np.zeros((8, 4))},
    "h_0": {"mlp": {"up": {"kernel": np.zeros((4, 16)), "bias": np.zeros(16)}}},
  }
  index = np.asarray([1, 2], np.int32)
  batch = batches.fill([[text.Example(np.arange(3, dtype=np.int32), index, index)]], 1, 7, 4)
  expected = 7 * (4 * 64 + 6 * 5) + 4 * (4 * 40)
  assert e2e_epoch.matmul_operations(params, 5, batch) == expected


def test_losses_that_differ_stop_the_benchmark():
  def way(loss):
    return e2e_epoch.Way(e2e_epoch.Trainer(lambda batch: loss, lambda: None, 1), [], {})  # pyright: ignore

  e2e_epoch.first_steps({"one": way(5.0), "two": way(5.0002)}, "float32")
  with pytest.raises(ValueError, match=r"losses on the same examples differ by 2\.0e-03"):
    e2e_epoch.first_steps({"one": way(5.0), "two": way(5.01)}, "float32")


def test_peft_gets_our_tokens_targets_and_segments():
  index = np.asarray([1, 2], np.int32)
  examples = [
    text.Example(np.asarray([1, 2, 3], np.int32), np.asarray([3, 9], np.int32), index),
    text.Example(np.asarray([4, 5, 6], np.int32), np.asarray([6, 9], np.int32), index),
  ]
  batch = batches.fill([examples], 1, 7, 4)
  inputs = e2e_epoch.peft_inputs(batch, packed=True)
  assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 0]]
  assert inputs["shift_labels"].tolist() == [[-100, 3, 9, -100, 6, 9, -100]]
  assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0]]
  mask = inputs["attention_mask"]
  assert mask.shape == (1, 1, 7, 7)
  assert [np.flatnonzero(row).tolist() for row in mask[0, 0]] == [
    *([0], [0, 1], [0, 1, 2]),
    *([3], [3, 4], [3, 4, 5]),
    [6],
  ]
  assert e2e_epoch.peft_inputs(batch, packed=False)["attention_mask"].tolist() == [[1] * 6 + [0]]


@pytest.mark.skipif(
  any(importlib.util.find_spec(name) is None for name in e2e_epoch.PEERS),
  reason=f"needs {', '.join(e2e_epoch.PEERS)}",
)
def test_all_four_ways_start_from_the_same_loss():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # transformers' own
    ways = e2e_epoch.main(SMALL)
  losses = [way.first_loss for way in ways.values()]
  assert len(losses) == 4
  np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
  assert ways["PEFT packed"].trainer.num_trainable == 4 * 16 * (1024 + 512 + 2 * 1280)
