"""The command: its plan, which runs it compares, its figures and tables, and what it refuses."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import lora_jax as lj
from experiments import subspaces as command
from experiments.analysis.subspaces import figures, plan, runs
from experiments.analysis.subspaces.page import PAPER_7, markdown, status_of
from experiments.analysis.subspaces.plan import config_of, planned_runs
from experiments.analysis.subspaces.runs import Trained, arrange, load_runs, pattern_of
from experiments.configs import subspaces as configs
from experiments.configs.subspaces import FULL, TINY
from experiments.harness.config import read_config, replace_fields
from experiments.nlg.config import E2EConfig
from experiments.nlg.e2e import shuffled_completions
from lora_jax.adapters.delta import LoraWeight
from lora_jax.analysis import similarity, subspaces
from lora_jax.axes import LoraAxes
from lora_jax.data.sets.e2e import Record

from tests.docs.pages import page
from tests.tiny_e2e import tiny_folder

DIM, LAYERS, KINDS = 32, 2, ("query", "value", "out")
AXES = LoraAxes((), (0,), (1,))


def tree(leaf):
  return {f"h_{i}": {"attn": {kind: {"kernel": leaf()} for kind in KINDS}} for i in range(LAYERS)}


def made(planned, base_seed=0):
  """Returns a run of random factors that was not trained."""
  config = read_config(E2EConfig, config_of(planned, "embedded", ""))
  draw, weights = (np.random.default_rng(seed) for seed in (len(planned.name), base_seed))
  rank = config.lora.rank
  params = tree(lambda: weights.standard_normal((DIM, DIM), np.float32))
  adapter = tree(
    lambda: LoraWeight(
      draw.standard_normal((DIM, rank), np.float32),
      0.1 * draw.standard_normal((rank, DIM), np.float32),
      AXES,
    )
  )
  lora = lj.LoraConfig(rank, config.lora.alpha, pattern_of(".*"))
  spaces = {kind: subspaces(lora, adapter, params, pattern_of(kind)) for kind in KINDS}
  result = {
    "base": base_seed,
    "valid_loss": 2.0,
    "base_parameters": 6_900_000,
    "num_train_records": TINY.lines,
    "device": "1 x cpu",
    "jax": "0.10",
    "commit": "0123456789ab",
  }
  base = SimpleNamespace(params=params)
  return Trained(Path(planned.name), config, result, adapter, base, spaces)


@pytest.fixture(scope="module")
def all_runs():
  return [made(planned) for planned in planned_runs("embedded", TINY)]


def test_the_plan_is_printed_and_is_that_of_the_page(tmp_path, capsys):
  command.main(["--plan", f"--root={tmp_path}"])
  assert not any(tmp_path.iterdir())
  printed = capsys.readouterr().out
  for model in ("embedded", "smollm2"):
    table = plan.plan(model, FULL)
    assert table in page("subspaces"), "paste the output of python -m experiments.subspaces --plan"
    runs = [read_config(E2EConfig, config_of(r, model, "a")) for r in planned_runs(model, FULL)]
    assert {run.lora.alpha / run.lora.rank for run in runs} == {2.0}
    assert sum(run.data.shuffled_completions for run in runs) == 2
    assert sum(run.model.start == "random" for run in runs) == 2
  assert plan.plan("embedded", FULL) in printed


def test_completions_are_moved_and_none_stays():
  records = [Record(f"c{i}", f"t{i}") for i in range(9)]
  moved = shuffled_completions(records, seed=1)
  assert sorted(record.completion for record in moved) == [r.completion for r in records]
  assert [record.context for record in moved] == [r.context for r in records]
  assert all(a.completion != b.completion for a, b in zip(records, moved, strict=True))
  assert moved == shuffled_completions(records, seed=1) != shuffled_completions(records, seed=2)
  with pytest.raises(ValueError, match="num_train_records of at least 2"):
    shuffled_completions(records[:1], seed=1)


def test_the_runs_find_their_places_in_any_order(all_runs):
  low, high, second, *nulls = all_runs
  study = arrange([*nulls[::-1], second, high, low])
  assert (study.low, study.high, study.second) == (low, high, second)
  assert [(run.rank, run.kind) for run in study.rows] == [
    *((2, kind) for kind in ("trained", "random base", "shuffled completions")),
    *((8, kind) for kind in ("trained", "random base", "shuffled completions")),
  ]
  only = arrange([high])
  assert (only.low, only.second, only.nulls, only.unused) == (None, None, [], [])
  assert study.unused == []


def test_a_run_without_a_place_is_named(all_runs):
  _, high, second, *_ = all_runs
  third = second._replace(
    config=replace_fields(second.config, {"seed": 3}), folder=Path("runs/third")
  )
  study = arrange([third, high, second])
  assert study.second is second
  assert study.unused == [third]
  assert "- Not compared: runs/third." in markdown(study, {}, "")


def test_a_null_of_another_seed_is_not_compared(all_runs):
  """Tables would have two rows of one name, and count the layers of the last one only."""
  _, high, _, shuffled, *_ = all_runs
  other = shuffled._replace(
    config=replace_fields(shuffled.config, {"seed": 3}), folder=Path("runs/other")
  )
  study = arrange([shuffled, other, high])
  assert (study.nulls, study.unused) == ([shuffled], [other])


def test_runs_that_cannot_be_compared_are_refused(all_runs):
  low, high, second, shuffled, *_ = all_runs
  with pytest.raises(ValueError, match="all runs are nulls"):
    arrange([shuffled])
  with pytest.raises(ValueError, match="have one rank, seed and kind of training"):
    arrange([high, high._replace(folder=Path("copy"))])
  with pytest.raises(ValueError, match="adapt different base models"):
    arrange([high, low._replace(result={"base": 1})])
  space = low.subspaces["value"]
  for names, message in (
    (("h/attn/value/kernel[0]", "h/attn/value/kernel[1]"), None),
    (("h_0/attn/value/kernel", "h_2/attn/value/kernel"), "adapt value in different layers"),
  ):
    other = low._replace(subspaces=low.subspaces | {"value": space._replace(names=names)})
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
      assert arrange([high, other]).low is other
  assert arrange([high, second]).low is None


def test_every_figure_has_its_panels(all_runs):
  study = arrange(all_runs)
  shapes = {
    name: [[panel.phi.shape for panel in row] for row in make(study)]
    for name, (_, make) in figures.FIGURES.items()
  }
  across, square = (2, 8), (8, 8)
  assert shapes["3"] == [[across, across, (2, 2), (2, 2)]]
  assert shapes["4"] == [[square] * 3]
  assert shapes["6"] == [[across] * LAYERS] * 2
  assert shapes["7"] == [[square] * LAYERS] * 2
  first = 4  # a tenth of 32 directions, rounded up
  assert shapes["8"] == [[(first, 2), (first, 8), (first, 2), (first, 8), (first, 8), (first, 8)]]
  (row,) = figures.FIGURES["8"][1](study)
  assert [panel.title for panel in row[2:4]] == [f"shuffled completions, r = {r}" for r in (2, 8)]
  first_directions = np.linalg.svd(study.high.weights("query")[1]).U[:, :first]
  expected = similarity(first_directions, all_runs[4].subspaces["query"].inputs[1])
  assert row[3].phi == pytest.approx(expected)
  (row,) = figures.FIGURES["3"][1](study)
  assert [panel.title for panel in row[:3]] == ["query, h_1", "value, h_1", "query, h_1, j ≤ 2"]
  expected = row[0].phi - np.maximum(*np.ogrid[1:3, 1:9]) / DIM
  assert row[0].excess == pytest.approx(expected)


def test_a_figure_is_written_and_those_without_runs_are_not(all_runs, tmp_path):
  low, high, *_ = all_runs
  panel = figures.Panel("query", np.full((2, 3), 0.5), 8)
  figures._draw(tmp_path / "a.png", "Figure", [[panel, panel], [panel]])
  assert (tmp_path / "a.png").stat().st_size > 1000
  drawable = [name for name, (_, make) in figures.FIGURES.items() if make(arrange([low, high]))]
  assert drawable == ["3", "6", "8"]


def test_the_page_has_every_table_with_its_status(all_runs):
  study = arrange(all_runs)
  text = markdown(study, {"3": Path("figure_3.png")}, status_of(study))
  status = "another base, embedded GPT-2 (6.9 M parameters)."
  assert text.startswith(f"Status of all values and figures of these runs: {status}\n")
  for line in (
    "| trained,rank=8,seed=2  |              trained |    8 |    2 |",
    "| r = 2 and r = 8, one seed |  query |              A |",
    "| two seeds, r = 8          |    out | delta, outputs |",
    "Table 7 for layer h_1",
    "| value  |    8 |          random base | ",
    "Noise floor: the error of rounding the base model's weights to Q4_0",
    "![Figure 3](figure_3.png)",
    "- Not drawn: Figure 4, Figure 6, Figure 7, Figure 8.",
  ):
    assert line in text
  paper = text.partition("The paper's Table 7, for GPT-3 175B: another model")[2]
  assert "| 4    | 6.91 |     0.32 |   21.67 |         0.02 |" in paper
  assert "embedded" not in paper


def test_a_delta_in_the_weights_last_directions_amplifies_more_than_one_in_the_first(all_runs):
  real, null = all_runs[1], all_runs[4]
  assert (real.rank, null.rank, null.kind) == (8, 8, "shuffled completions")
  u, values, v = np.linalg.svd(real.weights("query"))
  first, last = ((u[:, :, i], values[:, i], v.mT[:, :, i]) for i in (np.s_[:8], np.s_[-8:]))

  def scaled(run, directions):
    inputs, _, outputs = directions
    space = run.subspaces["query"]._replace(
      inputs=inputs, outputs=outputs, values=np.ones((LAYERS, 8))
    )
    return run._replace(subspaces={"query": space})

  text = markdown(arrange([scaled(real, last), scaled(null, first)]), {}, "")
  assert "| query  |    8 | shuffled completions | 2 of 2 |" in text
  text = markdown(arrange([scaled(real, first), scaled(null, last)]), {}, "")
  assert "| query  |    8 | shuffled completions | 0 of 2 |" in text
  assert f" {8**0.5:.3g} |" in text
  assert f" {np.linalg.norm(first[1], axis=1)[1]:.3g} |" in text


def test_the_page_of_one_run_says_what_is_missing(all_runs):
  text = markdown(arrange([all_runs[1]]), {}, "embedded GPT-2")
  assert "No run of a smaller rank and the same seed" in text
  assert "No run of rank 8 and another seed" in text
  assert "- Nulls: none, of two kinds." in text
  assert "Similarity of subspaces" not in text


def test_the_papers_amplifications_are_those_of_its_norms():
  for rank, delta, along, _, random, factor in PAPER_7[1:]:
    assert float(delta) / float(along) == pytest.approx(float(factor), abs=0.05)
    assert float(rank) * 61.95 / 12288 == pytest.approx(float(random), abs=0.01)  # its mean


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--report"], "has no finished runs yet; leave out --report"),
    (["--folders", "{root}/nothing"], "nothing is not the folder of a run"),
    (["--folders", "{root}", "--tiny"], "--folders takes finished runs; leave out --plan, --tiny"),
  ],
)
def test_what_cannot_be_done_is_refused(flags, message, tmp_path):
  with pytest.raises(SystemExit) as exit:
    command.main([f"--root={tmp_path}", *(flag.format(root=tmp_path) for flag in flags)])
  assert message in str(exit.value)


def test_runs_with_other_settings_are_refused(tmp_path):
  """Those of --tiny are no part of the study, although one has its name."""
  (planned,) = (
    run for run in planned_runs("embedded", TINY) if run.name == "trained,rank=8,seed=1"
  )
  folder = tmp_path / "embedded" / planned.name
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(config_of(planned, "embedded", str(folder)).to_json())
  (folder / "result.json").write_text('{"valid_loss": 1.0}')
  with pytest.raises(SystemExit, match="is a run with other settings than are planned now"):
    command.main(["--report", f"--root={tmp_path}"])


def test_the_page_of_other_folders_does_not_replace_the_studys(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(command, "report", lambda folders, out: f"{len(folders)} in {out}")
  command.main(["--folders", "a", "b", f"--root={tmp_path}"])
  assert f"2 in {tmp_path}/folders" in capsys.readouterr().out


def test_runs_without_factors_are_refused(tmp_path, monkeypatch):
  config = read_config(E2EConfig, config_of(planned_runs("embedded", TINY)[0], "embedded", "a"))
  monkeypatch.setattr(runs, "read_finished", lambda folder: {})
  for changes, message in (
    ({"method": "full_finetuning"}, "a run of method=full_finetuning, which has no low-rank"),
    ({"method": "dora"}, "expected one of lora, "),
  ):
    changed = replace_fields(config, changes)
    monkeypatch.setattr(runs, "read_run", lambda kind, folder, changed=changed: changed)
    with pytest.raises(ValueError, match=message):
      load_runs([tmp_path])


@pytest.mark.long
@pytest.mark.parametrize(("model", "layer"), [("tiny", "h[1]"), ("embedded", "h_3")])
def test_all_parts_with_the_tiny_sizes(model, layer, tmp_path, monkeypatch, capsys):
  def get_config(base):
    config = configs.variants.get_config(base)
    config.model.folder = str(tiny_folder())
    config.model.scan_layers = True
    return config

  if model == "tiny":  # the embedded one takes two minutes of a core
    monkeypatch.setattr(plan, "get_config", get_config)
  monkeypatch.setattr(command, "keep_freed_memory", lambda: None)  # it is for whole processes
  command.main(["--tiny", f"--root={tmp_path}"])
  folder = tmp_path / "embedded"
  text = (folder / "subspaces.md").read_text("utf-8")
  assert text in capsys.readouterr().out
  assert "Not drawn" not in text
  assert "| trained,rank=8,seed=2" in text
  assert f"Table 7 for layer {layer}" in text
  assert {path.name for path in folder.glob("*.png")} == {f"figure_{n}.png" for n in "34678"}
  monkeypatch.setattr(command.gpt2_e2e, "run", lambda config: pytest.fail("trained again"))
  chosen = [folder / name for name in ("trained,rank=8,seed=1", "trained,rank=2,seed=1")]
  out = tmp_path / "out"
  command.main(["--folders", *map(str, chosen), f"--out={out}"])
  assert "Not drawn: Figure 4, Figure 7." in (out / "subspaces.md").read_text("utf-8")
