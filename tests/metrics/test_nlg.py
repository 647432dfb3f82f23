"""The five scores equal the official E2E scorers'; without Java, three cells are empty."""

import importlib.util
import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_jax import metrics
from lora_jax.metrics import coco, java, ngrams

from tests.paths import GOLDEN as GOLDEN_FOLDER

GOLDEN = GOLDEN_FOLDER / "e2e_metrics.json.xz"
CORE = ["bleu", "nist"]
COCO = ["meteor", "rouge_l", "cider"]
SYSTEMS = ["held_out_reference", "truncated_8_words", "wrong_input"]


@pytest.fixture(scope="module")
def golden():
  return json.loads(lzma.decompress(GOLDEN.read_bytes()))


@pytest.fixture(scope="module")
def with_java():
  """Skips a test where METEOR, ROUGE-L and CIDEr cannot run."""
  if reason := java.why_missing():
    pytest.skip(reason)


@pytest.fixture(scope="module")
def measured(golden, with_java):
  systems = [golden["systems"][name]["hypotheses"] for name in SYSTEMS]
  return dict(zip(SYSTEMS, metrics.measure(systems, golden["references"]), strict=True))


@pytest.mark.parametrize("name", SYSTEMS)
def test_bleu_and_nist_are_those_of_the_official_scorer(golden, name):
  system, references = golden["systems"][name], golden["references"]
  nist = ngrams.nist(system["hypotheses"], references).score()
  assert nist == pytest.approx(system["scores"]["nist"], abs=1e-6)
  pytest.importorskip("sacrebleu")
  bleu = ngrams.bleu(system["hypotheses"], references).score()
  assert bleu == pytest.approx(system["scores"]["bleu"], abs=1e-6)


@pytest.mark.parametrize("metric", COCO)
@pytest.mark.parametrize("name", SYSTEMS)
def test_coco_scores_are_those_of_the_official_scorer(golden, measured, name, metric):
  got = getattr(measured[name].scores(), metric)
  # METEOR's corpus score is our aggregate of its segments, hence the narrow limit
  assert got == pytest.approx(golden["systems"][name]["scores"][metric], abs=1e-6)


def test_all_five_have_intervals_and_differences(measured):
  best, worst = measured["held_out_reference"], measured["truncated_8_words"]
  scores = best.scores()
  for name, actual in metrics.intervals(best, resamples=200).items():
    assert actual.low < actual.score < actual.high
    assert actual.score == getattr(scores, name)
  for actual in metrics.differences(best, worst, resamples=200).values():
    assert 0 < actual.low < actual.difference < actual.high
    assert actual.share_against == 0


def test_without_java_three_cells_are_empty(monkeypatch):
  monkeypatch.setenv("PATH", "")
  scores = metrics.score(["a b c d"], [["a b c d", "x"]])
  assert scores.nist == pytest.approx(np.log2(5))
  assert scores.meteor is scores.rouge_l is scores.cider is None
  assert set(COCO) == set(scores.missing) - {"bleu"}
  if importlib.util.find_spec("pycocoevalcap"):
    assert "install a Java runtime 8 or newer" in scores.missing["meteor"]


def test_without_the_packages_the_reason_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "sacrebleu", None)
  monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
  scores = metrics.score(["a b"], [["a b"]])
  assert (scores.bleu, scores.nist, scores.cider) == (None, 1.0, None)
  assert list(scores.missing) == ["bleu", *COCO]
  assert all("pip install lora-jax[metrics]" in reason for reason in scores.missing.values())


def put_java(folder, script, monkeypatch):
  """Puts a program of our own where `java` is looked for."""
  program = folder / "java"
  program.write_text(f"#!/bin/sh\n{script}\n")
  program.chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_java_that_does_not_run_counts_as_missing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pycocoevalcap", java)  # any module: it is only looked up
  put_java(tmp_path, "echo 'no Java runtime present' >&2; exit 1", monkeypatch)
  assert "Java was not found" in (java.why_missing() or "")


def test_a_java_program_that_fails_says_why(tmp_path, monkeypatch):
  put_java(tmp_path, "cat >/dev/null; echo one; echo 'out of memory' >&2; exit 3", monkeypatch)
  with pytest.raises(RuntimeError, match=r"status 3(.|\n)*out of memory"):
    java.run_java(["-jar", "x.jar"], ["text"])
  put_java(tmp_path, "cat >/dev/null; printf 'one\\ntwo\\n'", monkeypatch)
  with pytest.raises(RuntimeError, match=r"should answer 1 lines"):
    java.run_java(["-jar", "x.jar"], ["text"])


@pytest.mark.long
def test_awkward_texts_on_a_turkish_machine(with_java, monkeypatch):
  monkeypatch.setenv("LC_ALL", "C")
  monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr -Dfile.encoding=ISO-8859-1")
  texts = ["", "...", "The caf\u00e9, \u00a320", "a pub\nIN\u2028\u00fctown", "a\r\nb", "\n"]
  texts.append('<a href="x|||y"> the pub')  # a tag stays one token, METEOR's separator and all
  words = coco.tokenize_ptb(texts)
  assert words[2:4] == ["the caf\u00e9 # 20", "a pub in \u00fctown"]
  references = [["a pub", "in town"] if not text else ["a pub", text] for text in words]
  expected = [0, 0, 100, 100, 100, 0, 100]
  rouge = coco.rouge_l(words, references)
  assert rouge.formula(rouge.rows) == pytest.approx(expected)
  meteor = coco.meteor([*words, "IN"], [*references, ["in"]])
  assert meteor.formula(meteor.rows) == pytest.approx([*expected, 100])
  assert tuple(meteor.rows[6, :2]) == (11, 11)  # the whole tag
  assert meteor.formula(meteor.rows[:2].sum(axis=0)) == 0  # a corpus of empty texts


def test_cider_of_empty_texts_is_zero():
  pytest.importorskip("pycocoevalcap")
  assert coco.cider(["", ""], [["a pub", "the pub"], ["in town"]]).score() == 0


@pytest.mark.long
def test_resampled_meteor_is_that_of_the_jar(golden, with_java):
  from pycocoevalcap.meteor import meteor as package

  size = 40
  hypotheses = golden["systems"]["held_out_reference"]["hypotheses"][:size]
  references = [texts[0] for texts in golden["references"][:size]]
  words = coco.tokenize_ptb([*hypotheses, *references])
  pairs = list(zip(words[size:], words[:size], strict=True))
  jar = str(Path(package.__file__).with_name(package.METEOR_JAR))
  program = ["-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"]
  lines = java.run_java(program, [f"SCORE ||| {first} ||| {second}" for first, second in pairs])
  counts = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=5)
  drawn = [[lines[i] for i in np.repeat(np.arange(size), row)] for row in counts]
  requests = "\n".join(" ||| ".join(["EVAL", *rows]) for rows in drawn)
  run = subprocess.run(
    ["java", *java.FLAGS, *program], input=requests, capture_output=True, text=True, check=True
  )
  answers = run.stdout.split()[size :: size + 1]  # each request's segments, then its corpus
  statistics = coco.meteor(words[:size], [[text] for text in words[size:]])
  got = statistics.resampled(counts.astype(float))
  np.testing.assert_allclose(got, 100 * np.array(answers, float), rtol=1e-9)


def test_inputs_that_do_not_pair_up():
  with pytest.raises(ValueError, match="got 1 hypotheses for 2 segments"):
    metrics.score(["a"], [["a"], ["b"]])
  with pytest.raises(ValueError, match="got 2 hypotheses for 1 segments"):
    metrics.paired_bootstrap(["a"], ["a", "b"], [["a"]])
  with pytest.raises(ValueError, match=r"references\[1\] is empty"):
    metrics.score(["a", "b"], [["a"], []])
  with pytest.raises(ValueError, match="at least one segment"):
    metrics.score([], [])
  with pytest.raises(ValueError, match=r"references\[0\]\[1\] has no word: '\.\.'"):
    metrics.score(["a"], [["a", ".."]])
  with pytest.raises(ValueError, match=r"references\[0\] is one string.*\['a pub'\]"):
    metrics.score(["a"], ["a pub"])
  with pytest.raises(ValueError, match="got one string"):
    metrics.score("a", [["a"]])
