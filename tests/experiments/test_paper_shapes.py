"""The paper's tables at their real shapes: counts, what is said of misprints, and the page."""

import math

import pytest

from experiments import paper_shapes
from experiments.shapes import page, results, steps
from experiments.shapes.models import GPT2_MEDIUM, GPT3, MODELS, count, make_module
from experiments.shapes.rows import (
  ROWS,
  adapter_count,
  gpt2_count,
  layer_count,
  lora_count,
  lora_of,
  reading,
  target_of,
)
from lora_jax.models.gpt2.model import GPT2Config
from lora_jax.models.parts.causal_lm import shapes_of
from lora_jax.trees import leaves_with_path, matches

TABLE_ROWS = {row.name: row for row in ROWS}
CHEAP = {  # one for each kind of method; the others are long
  *("RoBERTa base, FT", "RoBERTa base, BitFit", "GPT-2 M, FT Top2", "GPT-3, LoRA, qkvo, r = 64"),
  *("RoBERTa large, Adapter H, r = 8", "GPT-3, PreLayer, lp + li = 16", "DeBERTa XXL, FT"),
}


@pytest.mark.parametrize(
  "name",
  [name if name in CHEAP else pytest.param(name, marks=pytest.mark.long) for name in TABLE_ROWS],
)
def test_the_count_is_the_formula(name):
  assert TABLE_ROWS[name].trained == TABLE_ROWS[name].value


def test_every_printed_count_is_read_or_has_a_note():
  assert TABLE_ROWS.keys() >= CHEAP
  assert len(TABLE_ROWS) == len(ROWS)
  for row in ROWS:
    differing = [text for text in row.printed.values() if not reading(text, row.value)]
    assert row.note is not None or not differing, row.name
    if row.note is not None and row.note.explains is not None:
      assert all(reading(text, row.note.explains) for text in row.printed.values()), row.name
  tables = {table for row in ROWS for table in row.printed}
  assert tables == {"2", "3", "4", "13", "14", "15"}


def test_counts_are_read_as_printed():
  assert reading("25.19M", 25_192_448) == "rounded"
  assert reading("24M", 25_192_448) == "rounded, of 2^20"
  assert reading("301.9M", 301_989_888) == "cut off"
  assert reading("125.0M", 124_647_170) == "rounded to millions"
  assert reading("175B", 174_604_259_328) == "rounded"
  assert reading("175,255.8M", 175_255_800_000) == "rounded"
  assert reading("0.35M", 393_216) == ""


def note(name):
  return TABLE_ROWS[name].note.text


def test_the_notes_are_right():
  assert "354.82M" in note("GPT-2 M, FT")
  assert f"{gpt2_count(GPT2_MEDIUM) / 1e6:.2f}" == "354.82"
  assert f"{gpt2_count(MODELS['GPT-2 L']) / 1e6:.2f}" == "774.03"
  widths = [reading("11.09M", adapter_count(GPT2_MEDIUM, width, 48)) for width in range(300)]
  assert not any(widths)  # no r gives it for Adapter H
  for name, per_slot in (("GPT-2 M", 24 * 1024), ("GPT-2 L", 36 * 1280)):
    printed = TABLE_ROWS[f"{name}, LoRA, qv, r = 4"].printed["3"]
    assert not any(f"{n * per_slot / 1e6:.2f}M" == printed for n in range(40))
    (slots,) = (row.value // per_slot for row in ROWS if row.name.startswith(f"{name}, PreLayer"))
    size = 1e6 * float(printed[:-1])
    assert slots == min(range(40), key=lambda n, d=per_slot, size=size: abs(n * d - size))
  assert "651.5M fewer" in note("GPT-3, FT")
  assert f"{175_255.8 - gpt2_count(GPT3) / 1e6:.1f}" == "651.5"
  biases = [
    leaf.size for path, leaf in leaves_with_path(shapes_of(make_module(GPT3))) if "bias" in path
  ]
  assert sum(biases) == (11 * 96 + 1) * 12288  # 4 D, 5 D and 2 D a layer, and the last norm
  layers = [row for row in ROWS if row.name.startswith("GPT-3, PreLayer")]
  excess = [1e6 * float(row.printed["15"][:-1]) / row.value - 1 for row in layers]
  assert [round(100 * share) for share in (min(excess), max(excess))] == [1, 8]
  counts = {f"{n * 96 * 12288 / 1e6:.1f}M" for n in range(80)}
  assert not counts & {row.printed["15"] for row in layers}
  both = TABLE_ROWS["GPT-3, LoRA+PL, qv, r = 8, lp + li = 12"]
  part = both.value - lora_count(GPT3, 8, 2)
  assert round(100 * ((52.8e6 - lora_count(GPT3, 8, 2)) / part - 1)) in (6, 7)
  xxl = MODELS["DeBERTa XXL"]
  assert 2 * lora_count(xxl, 8, 2) == lora_count(xxl, 16, 2)
  assert TABLE_ROWS["GPT-2 M, FT Top2"].value == 2 * layer_count(GPT2_MEDIUM)


@pytest.mark.parametrize(
  ("matrices", "rank"), [("q", 8), ("k", 8), ("v", 8), ("o", 8), ("qk", 4), ("qv", 4), ("qkvo", 2)]
)
def test_the_matrices_of_table_5_are_targets_of_one_budget(matrices, rank):
  """Table 5 compares them at 18M parameters, for GPT-3."""
  shapes = shapes_of(make_module(GPT3))
  names = {"q": "query", "k": "key", "v": "value", "o": "out"}
  chosen = [path for path, _ in leaves_with_path(shapes) if matches(target_of(matrices), path)]
  assert sorted(chosen) == sorted(f"h/attn/{names[letter]}/kernel" for letter in matrices)
  assert lora_count(GPT3, rank, len(matrices)) == 18_874_368


def test_lora_of_four_matrices_trains_them():
  tiny = GPT2Config(vocab_size=11, num_positions=4, embed_dim=8, num_layers=2, num_heads=2)
  assert count(tiny, lora_of("qkvo", 2)) == lora_count(tiny, 2, 4)


@pytest.fixture
def tiny(monkeypatch):
  """The page and steps of one small model."""
  shape = GPT2Config(
    vocab_size=64, num_positions=8, embed_dim=16, num_layers=3, num_heads=2, scan_layers=True
  )
  for module in (page, steps):
    monkeypatch.setattr(module, "MODELS", {"GPT-3": shape})
  return shape


@pytest.mark.long
def test_a_step_of_lora_costs_less_than_full_finetuning(tiny):
  costs = {name: steps.step_cost("GPT-3", name, 2, 1, 8) for name in steps.METHODS}
  weights = 4 * gpt2_count(tiny)
  assert costs["FT"].arguments > 3 * weights  # with Adam's moments
  assert weights < costs["LoRA"].arguments < 1.5 * weights
  forward = 2 * 8 * (3 * 12 * 16**2 + 64 * 16)  # of dense layers and the head
  assert costs["FT"].flops > 3 * forward
  assert costs["LoRA"].flops < costs["FT"].flops
  assert costs["LoRA"].temporaries < costs["FT"].temporaries


def test_the_page_has_the_tables_and_says_what_was_not_run(tmp_path, monkeypatch, capsys):
  names = ("GPT-2 M, FT Top2", "GPT-3, FT")
  monkeypatch.setattr(page, "ROWS", [TABLE_ROWS[name] for name in names])
  monkeypatch.setattr(page, "MODELS", {"GPT-3": GPT3})
  monkeypatch.chdir(tmp_path)
  paper_shapes.main([])
  text = capsys.readouterr().out
  assert not list(tmp_path.iterdir())  # a page with compiled steps is not replaced unasked
  monkeypatch.setattr(paper_shapes, "page", lambda *arguments: text)  # it takes a second
  paper_shapes.main(["--out", "page.md"])
  assert (tmp_path / "page.md").read_text() == text
  lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
  assert [cell.strip() for cell in lines["GPT-2 M, FT Top2"].split("|")[2:-1]] == [
    *("25,192,448", "2 (12 D^2 + 13 D)", "25.19M, 24M", "rounded, rounded, of 2^20"),
    *("100.8", "50.4"),
  ]
  assert "349.2 GB and 37.7 MB (36.0 MiB), a ratio of\n9,251" in text
  assert lines["GPT-3, LoRA, r = 4"].split("|")[-2].strip() == "not run"
  memory = [cell.strip() for cell in lines["GPT-3, LoRA, qv, r = 4"].split("|")[2:-1]]
  assert memory == ["18,874,368", "698.49", "0.0755", "0.15", "698.72", "349.51"]
  weights, state = 174_604_259_328 + 18_874_368, 8 * 18_874_368
  assert math.isclose(4 * weights + 4 * 18_874_368 + state, 698.72e9, rel_tol=1e-4)


def test_folders_are_made_before_the_work(tmp_path, monkeypatch):
  monkeypatch.setattr(paper_shapes, "page", lambda *_: "text")
  paper_shapes.main([f"--out={tmp_path}/a/b/page.md"])
  assert (tmp_path / "a/b/page.md").read_text() == "text"
  monkeypatch.setattr(paper_shapes, "page", lambda *_: pytest.fail("it was computed"))
  (tmp_path / "file").touch()
  with pytest.raises(SystemExit, match="is a file, expected a folder"):
    paper_shapes.main([f"--out={tmp_path}/file/page.md"])


def test_saved_sizes_of_other_models_are_kept(tmp_path, monkeypatch, capsys):
  flops = iter(range(1, 100))
  monkeypatch.setattr(paper_shapes, "page", lambda *_: "")
  monkeypatch.setattr(paper_shapes, "step_cost", lambda *_: steps.Cost(next(flops), 0.0, 1.0))
  path = tmp_path / "shapes.json"

  def saved(*flags):
    paper_shapes.main([*flags, f"--save={path}"])
    sizes = results.read(results.Sizes, path)
    return [(step.model, step.method, step.memory) for step in sizes.steps]

  medium, large = (
    [(name, "FT", number), (name, "LoRA", number + 1)]
    for name, number in (("GPT-2 M", 1), ("GPT-2 L", 3))
  )
  assert saved("--steps", "gpt-2_m") == medium
  capsys.readouterr()
  assert saved("--steps", "gpt-2_l") == [*medium, *large]
  assert f"{path} keeps the sizes of GPT-2 M" in capsys.readouterr().out
  assert saved("--steps", "gpt-2_m") == [*large, ("GPT-2 M", "FT", 5), ("GPT-2 M", "LoRA", 6)]
  message = r"shapes\.json has steps of 1 x 128 tokens, expected 2 x 128 tokens.*--save another"
  with pytest.raises(SystemExit, match=message):
    paper_shapes.main(["--steps", "gpt-2_m", "--batch=2", f"--save={path}"])
  assert next(flops) == 7, "refused before a step was compiled"
  path.write_text('{"batch": "1 x 128 tokens"}')
  with pytest.raises(SystemExit, match=r"shapes\.json: the config lacks the field 'steps'"):
    paper_shapes.main(["--steps", "gpt-2_m", f"--save={path}"])


def test_a_step_of_an_unknown_model_is_refused(capsys):
  with pytest.raises(SystemExit):
    paper_shapes.main(["--steps", "gpt-4"])
  assert "invalid choice: 'gpt-4'" in capsys.readouterr().err
  with pytest.raises(SystemExit, match="--batch must be"):
    paper_shapes.main(["--steps", "gpt-2_m", "--batch=0"])
