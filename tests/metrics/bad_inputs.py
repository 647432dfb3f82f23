"""Texts, labels and settings that the metrics refuse."""

from functools import cache

import numpy as np

from lora_jax import metrics
from lora_jax.metrics import coco, glue, java, ngrams, slots
from lora_jax.metrics.nlg import Measured
from lora_jax.metrics.segments import mean_of_segments

from tests.bad_inputs import BadInput

TWO = np.array([0, 1])
LOGITS = np.array([[1.0, 0.0], [0.0, 1.0]])


def texts(name, hypotheses, references, *words):
  return BadInput(name, lambda _: metrics.score(hypotheses, references), words)


@cache
def measured(segments=2):
  """Statistics that no text was scored for."""
  return Measured({"nist": mean_of_segments(np.ones(segments))}, {})


def resampled(name, *words, call=metrics.intervals, systems=(2,), **settings):
  return BadInput(name, lambda _: call(*map(measured, systems), **settings), words)


def task(name, *words, task="rte", outputs=LOGITS, labels=TWO, **options):
  return BadInput(f"{task}: {name}", lambda _: glue.score(task, outputs, labels, **options), words)


def pair(name, metric, predicted, labels, *words):
  call = getattr(glue, metric)
  return BadInput(f"{metric}: {name}", lambda _: call(predicted, labels), words)


ROWS = [
  texts("no segments", [], [], "at least one segment"),
  texts("too few hypotheses", ["a"], [["a"], ["b"]], "1 hypotheses", "2 segments"),
  texts("too many hypotheses", ["a", "b"], [["a"]], "2 hypotheses", "1 segments"),
  texts("one hypothesis alone", "a", [["a"]], "a list of hypotheses", "'a'"),
  texts("a hypothesis that is None", [None], [["a"]], "hypotheses[0]", "None"),
  texts("a hypothesis of words", [["a"]], [["a"]], "hypotheses[0]", "['a']"),
  texts("a hypothesis of bytes", [b"a"], [["a"]], "hypotheses[0]", "b'a'"),
  texts("half of a surrogate pair", ["\ud83d"], [["a"]], "hypotheses[0]", "surrogate"),
  texts("one reference alone", ["a"], ["a"], "references[0] is one string"),
  texts("references of one text", ["a"], "a", "references"),
  texts("no references of a segment", ["a"], [[]], "references[0] is empty"),
  texts("references that are None", ["a"], [None], "references[0]", "None"),
  texts("a reference that is a number", ["a"], [[1]], "references[0][0]", "1"),
  texts("a reference without a word", ["a"], [["a", "..."]], "references[0][1]", "no word"),
  texts("half of one in a reference", ["a"], [["a \ud83d"]], "references[0][0]", "surrogate"),
  resampled("no resamples", "resamples", "0", resamples=0),
  resampled("negative resamples", "resamples", "-1", resamples=-1),
  resampled("a fraction of resamples", "resamples", "1.5", resamples=1.5),
  resampled("10^9 resamples", "resamples", "1,000,000,000", resamples=10**9),
  resampled("a confidence of 1", "confidence", "1", confidence=1.0),
  resampled("a confidence of NaN", "confidence", "nan", confidence=float("nan")),
  resampled("a confidence in percent", "confidence", "95", confidence=95),
  resampled("a confidence of text", "confidence", "'95%'", confidence="95%"),
  resampled("a negative seed", "seed", "-1", seed=-1),
  resampled("systems of two sizes", "2 and 3 segments", call=metrics.differences, systems=(2, 3)),
  task("another task", "task", "cola", "'ax'", task="ax"),
  task("no examples", "labels", "(0, 2)", outputs=LOGITS[:0], labels=[]),
  task("too few labels", "1 labels", "(2, 2)", labels=[0]),
  task("outputs in a row", "(2,)", outputs=TWO),
  task("ragged outputs", "outputs", outputs=[[1.0], [1.0, 2.0]]),
  task("outputs of text", "outputs", outputs=[["a", "b"], ["c", "d"]]),
  task("outputs of NaN", "finite outputs", outputs=LOGITS * np.nan),
  task("one class", "two classes", "(2, 1)", outputs=LOGITS[:, :1]),
  task("a label above the classes", "labels[1]", "2", labels=[0, 2]),
  task("a hidden label", "labels[0]", "-1", labels=[-1, 1]),
  task("a label that is None", "labels[0]", "None", labels=[None, 1]),
  task("a label of a fraction", "labels[0]", "0.5", labels=[0.5, 1]),
  task("labels of text", "labels[0]", "'a'", labels=["a", "b"]),
  task("a score of NaN", "labels[0]", "nan", task="stsb", labels=[float("nan"), 1.0]),
  task("a score that is None", "labels[0]", "None", task="stsb", labels=[None, 1.0]),
  task("no groups", "groups", "2", "0", task="copa"),
  task("too few groups", "groups", "2", "1", task="multirc", groups=[0]),
  task("no answers", "entities", "2", "0", task="record", groups=[0, 0]),
  task("answers of numbers", "answers[0]", "1", task="record", groups=[0, 0], answers=[1, 2]),
  pair("no predictions", "accuracy", TWO[:0], TWO[:0], "at least one"),
  pair("other sizes", "accuracy", TWO, TWO[:1], "(2,)", "(1,)"),
  pair("other sizes", "f1", TWO, TWO[:1], "(2,)", "(1,)"),
  pair("no predictions", "macro_f1", TWO[:0], TWO[:0], "at least one"),
  pair("other sizes", "matthews", TWO, TWO[:1], "(2,)", "(1,)"),
  pair("no scores", "pearson", TWO[:0], TWO[:0], "at least one"),
  pair("a table", "spearman", LOGITS, LOGITS, "(2, 2)"),
  pair("a score of NaN", "pearson", TWO * np.nan, TWO, "finite"),
  BadInput("bleu: other sizes", lambda _: ngrams.bleu(["a"], []), ("1", "0")),
  BadInput("nist: other sizes", lambda _: ngrams.nist(["a"], []), ("1", "0")),
  BadInput("rouge_l: other sizes", lambda _: coco.rouge_l(["a"], []), ("1", "0")),
  BadInput("cider: no segments", lambda _: coco.cider([], []), ("at least one segment",)),
  BadInput("slots: other sizes", lambda _: slots.slot_scores(["a"], []), ("1 texts", "0 inputs")),
  BadInput("slots: no texts", lambda _: slots.slot_scores([], []), ("0 texts",)),
  BadInput(
    "slots: an unknown slot",
    lambda _: slots.parse_slots("name : Aromi | colour : red"),
    ("Type", "'colour : red'"),
  ),
  BadInput(
    "slots: a slot twice",
    lambda _: slots.parse_slots("name[Aromi], name[Cotto]"),
    ("at most once", "'name[Cotto'"),
  ),
  BadInput("slots: no name", lambda _: slots.parse_slots("Type : pub"), ("expected a name",)),
  BadInput("java: a text of two lines", lambda _: java.run_java([], ["a\nb"]), ("line break",)),
]
