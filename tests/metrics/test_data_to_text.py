"""The scores of WebNLG and DART: their tokens, their references, and METEOR as the jar has it."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax import metrics
from lora_jax.metrics import data_to_text, java

TEXTS = ["Al's farm (3.5 acres) is in Bee-ville.", "Cy plays for É_1.", "Di  is\t9 ."]
REFERENCES = [
  ["Al has a 3.5-acre farm in Bee-ville.", "In Bee-ville, Al farms."],
  ["Cy plays for É_1."],
  ["Di is 9 years old.", "Di is nine.", "The age of Di is 9."],
]


def test_tokens_are_lowercased_words_and_single_characters():
  assert data_to_text.tokenize(TEXTS[0]) == "al ' s farm ( 3 . 5 acres ) is in bee - ville ."
  assert data_to_text.tokenize(TEXTS[1]) == "cy plays for é_1 ."
  assert data_to_text.tokenize(TEXTS[2]) == "di is 9 ."


@pytest.mark.long
def test_all_four_have_intervals_and_differences():
  pytest.importorskip("sacrebleu")
  if reason := java.why_missing():
    pytest.skip(reason)
  good, bad = data_to_text.measure([TEXTS, ["x"] * 3], REFERENCES)
  intervals = metrics.intervals(good, resamples=50)
  assert list(intervals) == list(data_to_text.METRICS)
  for interval in intervals.values():
    assert interval is not None
    assert interval.low <= interval.score <= interval.high
  differences = metrics.differences(good, bad, resamples=50)
  for name, sign in {"bleu": 1, "meteor": 1, "ter": -1, "mean_ter": -1}.items():
    assert sign * differences[name].difference > 0


def test_the_seventh_reference_does_not_count(monkeypatch):
  pytest.importorskip("sacrebleu")
  monkeypatch.setenv("PATH", "")
  (sixth,) = data_to_text.measure([["a b"]], [[*["x y"] * 5, "a b"]])
  (seventh,) = data_to_text.measure([["a b"]], [[*["x y"] * 6, "a b"]])
  assert [m.statistics["ter"].score() for m in (sixth, seventh)] == [0, 100]
  assert list(seventh.statistics) == ["bleu", "ter", "mean_ter"]
  assert list(seventh.missing) == ["meteor"]
  assert list(metrics.intervals(seventh, resamples=5)) == [*seventh.statistics, "meteor"]


def test_without_the_packages_the_reason_names_the_extra(monkeypatch):
  for name in ("sacrebleu", "pycocoevalcap"):
    monkeypatch.setitem(sys.modules, name, None)
  (measured,) = data_to_text.measure([["a b"]], [["a b"]])
  assert measured.statistics == {}
  assert sorted(measured.missing) == sorted(data_to_text.METRICS)
  assert all("lora-jax[metrics]" in reason for reason in measured.missing.values())
  with pytest.raises(ValueError, match=r"statistics of at least one metric, got none; .*sacrebleu"):
    metrics.intervals(measured)


def test_inputs_that_do_not_pair_up():
  with pytest.raises(ValueError, match="got 1 hypotheses for 2 segments"):
    data_to_text.measure([["a"]], [["a"], ["b"]])
  with pytest.raises(ValueError, match=r"references\[1\]\[0\] has no word"):
    data_to_text.measure([["a", "b"]], [["a"], [""]])


@pytest.mark.long
def test_meteor_is_that_of_the_jar_on_the_files_of_the_papers_code(tmp_path):
  if reason := java.why_missing():
    pytest.skip(reason)
  from pycocoevalcap.meteor import meteor as package

  texts = [data_to_text.tokenize(text) for text in TEXTS]
  padded = [[*group, *[group[0]] * 6][:6] for group in REFERENCES]  # with the first, as the code
  lines = [data_to_text.tokenize(text) for group in padded for text in group]
  for name, rows in (("hypotheses", texts), ("references", lines)):
    (tmp_path / name).write_text("\n".join(rows), "utf-8")
  jar = str(Path(package.__file__).with_name(package.METEOR_JAR))
  files = [str(tmp_path / "hypotheses"), str(tmp_path / "references")]
  command = ["java", *java.FLAGS, "-Dfile.encoding=UTF-8", "-jar", jar, *files]
  options = ["-l", "en", "-norm", "-r", "6"]
  run = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
  (measured,) = data_to_text.measure([TEXTS], REFERENCES)
  expected = 100 * float(run.stdout.split()[-1])
  assert measured.statistics["meteor"].score() == pytest.approx(expected, abs=1e-6)
