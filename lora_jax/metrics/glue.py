"""The metrics of GLUE and SuperGLUE, as the benchmarks and the paper's Table 2 report them.

| task                        | metrics; the first is the paper's, and chooses the best epoch     |
|-----------------------------|-------------------------------------------------------------------|
| CoLA                        | Matthews correlation                                              |
| STS-B                       | Pearson correlation, Spearman's                                   |
| MRPC, QQP                   | accuracy, F1 of class 1                                           |
| SST-2, MNLI, QNLI, RTE, ... | accuracy; MNLI's over matched and mismatched together             |
| CB                          | accuracy, mean of the classes' F1                                 |
| COPA                        | accuracy of the choice with the higher score                      |
| MultiRC                     | F1 over all answers, exact match of a question's answers          |
| ReCoRD                      | F1 of the best entity's words, exact match                        |

All are between -1 and 1, not percent. Where a metric's denominator is zero it is 0, as in
scikit-learn: Matthews' of predictions of a single class, F1 without a true positive. So are the
correlations of constant predictions, where scipy has NaN: they rank nothing, and a NaN could not
be compared when the best epoch is chosen.

Each function raises ValueError if the sizes differ or there is nothing to score.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

Labels = Int[np.ndarray, " N"]
Scores = Float[np.ndarray, " N"]


def _check_pair(predicted: np.ndarray, labels: np.ndarray) -> None:
  shapes = np.shape(predicted), np.shape(labels)
  if shapes[0] != shapes[1] or len(shapes[0]) != 1 or not shapes[0][0]:
    raise ValueError(
      f"expected as many predictions as labels, at least one, got {shapes[0]} and {shapes[1]}"
    )


def accuracy(predicted: Labels, labels: Labels) -> float:
  """Returns the share of right predictions."""
  _check_pair(predicted, labels)
  return float(np.mean(predicted == labels))


def f1(predicted: Labels, labels: Labels, positive: int = 1) -> float:
  """Returns the harmonic mean of precision and recall of one class; 0 if it is never right."""
  _check_pair(predicted, labels)
  right = np.sum((predicted == positive) & (labels == positive))
  total = np.sum(predicted == positive) + np.sum(labels == positive)
  return float(2 * right / total) if total else 0.0


def macro_f1(predicted: Labels, labels: Labels) -> float:
  """Returns the mean F1 of the classes that occur."""
  _check_pair(predicted, labels)
  return float(np.mean([f1(predicted, labels, c) for c in np.union1d(predicted, labels)]))


def matthews(predicted: Labels, labels: Labels) -> float:
  """Returns Matthews' correlation, of two classes or more (Gorodkin 2004)."""
  _check_pair(predicted, labels)
  classes = np.union1d(predicted, labels)
  a, b = predicted[:, None] == classes, labels[:, None] == classes
  return pearson_of_matrices(a.astype(float), b.astype(float))


def pearson_of_matrices(a: Float[np.ndarray, "N C"], b: Float[np.ndarray, "N C"]) -> float:
  """Returns the correlation of all columns together; 0 if either side is constant."""
  a, b = a - a.mean(axis=0), b - b.mean(axis=0)
  scale = np.sqrt(np.sum(a * a) * np.sum(b * b))
  return float(np.sum(a * b) / scale) if scale else 0.0


def pearson(predicted: Scores, labels: Scores) -> float:
  """Returns the linear correlation; 0 if either side is constant."""
  _check_pair(predicted, labels)
  if not (np.all(np.isfinite(predicted)) and np.all(np.isfinite(labels))):
    raise ValueError("expected finite scores and labels")
  if np.ptp(predicted) == 0 or np.ptp(labels) == 0:  # a mean may be off by a rounding error
    return 0.0
  return pearson_of_matrices(
    np.asarray(predicted, np.float64)[:, None], np.asarray(labels, np.float64)[:, None]
  )


def spearman(predicted: Scores, labels: Scores) -> float:
  """Returns the correlation of the ranks, ties at their mean rank; 0 if a side is constant."""
  _check_pair(predicted, labels)
  return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Scores) -> Scores:
  _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
  last = np.cumsum(counts)
  return ((2 * last - counts + 1) / 2)[inverse]


# ---- the tasks ---------------------------------------------------------------------------

ACCURACY = {"accuracy": accuracy}
PAIRS = {"accuracy": accuracy, "f1": f1}
CLASSES: dict[str, dict[str, Callable[[Labels, Labels], float]]] = {
  "cola": {"matthews": matthews},
  "mrpc": PAIRS,
  "qqp": PAIRS,
  **dict.fromkeys(("sst2", "mnli", "qnli", "rte", "wnli", "boolq", "wic", "wsc"), ACCURACY),
  "cb": {"accuracy": accuracy, "f1": macro_f1},
}
GROUPED = {"copa": ("accuracy",), "multirc": ("f1", "exact_match"), "record": ("f1", "exact_match")}


def main_metric(task: str) -> str:
  """Returns the name of the metric in the tables, which chooses the best epoch."""
  if task == "stsb":
    return "pearson"
  if task not in CLASSES and task not in GROUPED:
    tasks = ", ".join(("stsb", *CLASSES, *GROUPED))
    raise ValueError(f"task must be one of {tasks}, got {task!r}")
  return next(iter(CLASSES[task])) if task in CLASSES else GROUPED[task][0]


def score(
  task: str,
  outputs: Float[np.ndarray, "N L"],
  labels: Sequence[int | float],
  groups: Sequence[int] = (),
  answers: Sequence[str] = (),
) -> dict[str, float]:
  """Returns the metrics of a task by name.

  Args:
    task: of GLUE or SuperGLUE, as `cola`.
    outputs: the model's, for each record: L classes' logits, or the score of a regression.
    labels: the label of each record.
    groups: the number of each record's question, for COPA, MultiRC and ReCoRD.
    answers: each record's entity, for ReCoRD.
  Raises:
    ValueError: if the sizes differ, an output is not finite, or a label is not one of the L.
  """
  main_metric(task)
  try:
    outputs = np.asarray(outputs, np.float64)
  except (TypeError, ValueError) as error:
    raise ValueError(f"expected the outputs as an array of numbers: {error}") from error
  if outputs.ndim != 2 or len(outputs) != len(labels) or not len(labels):
    raise ValueError(
      f"expected the outputs (records, classes) of {len(labels)} labels, got {outputs.shape}"
    )
  num_classes = None if task == "stsb" else outputs.shape[1]
  if num_classes is not None and num_classes < 2:
    raise ValueError(f"{task}: expected outputs of at least two classes, got {outputs.shape}")
  expected = _checked_labels(labels, num_classes)
  if not np.all(np.isfinite(outputs)):
    raise ValueError("expected finite outputs; the training has probably diverged")
  if task == "stsb":
    return {
      "pearson": pearson(outputs[:, 0], expected),
      "spearman": spearman(outputs[:, 0], expected),
    }
  predicted = np.argmax(outputs, axis=1)
  if task in CLASSES:
    return {name: metric(predicted, expected) for name, metric in CLASSES[task].items()}
  if len(groups) != len(expected):
    raise ValueError(f"{task} needs the groups of {len(expected)} records, got {len(groups)}")
  if task == "multirc":
    same = _by_group(predicted == expected, groups)
    exact = np.mean([np.all(right) for right in same])
    return {"f1": f1(predicted, expected), "exact_match": float(exact)}
  margins = _by_group(outputs[:, 1] - outputs[:, 0], groups)
  chosen = [int(np.argmax(margin)) for margin in margins]
  targets = _by_group(expected, groups)
  if task == "copa":
    return {"accuracy": float(np.mean([w[c] for w, c in zip(targets, chosen, strict=True)]))}
  if len(answers) != len(expected):
    raise ValueError(f"record needs the entities of {len(expected)} records, got {len(answers)}")
  for i, answer in enumerate(answers):
    if not isinstance(answer, str):
      raise ValueError(f"answers[{i}] must be a string, got {answer!r:.100}")
  return _entities(chosen, targets, _by_group(np.asarray(answers, object), groups))


def _checked_labels(labels: Sequence[int | float], num_classes: int | None) -> np.ndarray:
  """Returns the labels: numbers of classes, or finite scores if `num_classes` is None."""
  for i, label in enumerate(labels):
    if num_classes is None:
      is_valid = isinstance(label, int | float | np.number) and np.isfinite(label)
    else:
      is_valid = isinstance(label, int | np.integer) and 0 <= label < num_classes
    if not is_valid:
      kind = "a finite score" if num_classes is None else f"a class in [0, {num_classes})"
      raise ValueError(f"labels[{i}] must be {kind}, got {label!r:.100}")
  return np.asarray(labels)


def _by_group(values: np.ndarray, groups: Sequence[int]) -> list[np.ndarray]:
  """Returns the values of each group, in their order."""
  order = np.argsort(groups, kind="stable")
  starts = np.flatnonzero(np.diff(np.asarray(groups)[order])) + 1
  return np.split(values[order], starts)


def _entities(
  chosen: Sequence[int], targets: Sequence[np.ndarray], entities: Sequence[np.ndarray]
) -> dict[str, float]:
  """Returns ReCoRD's metrics: the chosen entity against the nearest right one."""
  overlaps, exact = [], []
  for choice, right, names in zip(chosen, targets, entities, strict=True):
    chosen_words = _words(names[choice])
    answers = [_words(name) for name, is_right in zip(names, right, strict=True) if is_right]
    overlaps.append(max((_overlap(chosen_words, answer) for answer in answers), default=0.0))
    exact.append(chosen_words in answers)
  return {"f1": float(np.mean(overlaps)), "exact_match": float(np.mean(exact))}


def _words(text: str) -> list[str]:
  """Returns a text's words as SQuAD's script compares them: no case, punctuation, articles."""
  letters = "".join(c for c in text.lower() if c not in string.punctuation)
  return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def _overlap(a: Sequence[str], b: Sequence[str]) -> float:
  common = sum((Counter(a) & Counter(b)).values())
  return 2 * common / (len(a) + len(b)) if common else 0.0
