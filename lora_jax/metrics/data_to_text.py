"""The scores of WebNLG and DART in the paper's Tables 13 and 14: BLEU, METEOR and TER.

Hu et al.'s code writes hypotheses and references lowercased, with a space around every character
that is no letter, digit or underscore, and at most six references of an input; WebNLG's evaluation
script (GenerationEval) scores these files. Differences:

- The script counts one more segment, empty, which the line break at the end of the files makes: its
  TER is 1 there. We score the segments.
- An empty reference, of which DART has one, is left out by the reader, `dart.py`.
- For METEOR the script puts NLTK's word tokenizer in between; METEOR normalizes texts in any case.
- TER's edits are sacrebleu's, which shifts phrases as Tercom does. The script's package, pyter,
  needs more: its mean is 44.6 where `mean_ter` is 43.1, on 100 inputs of WebNLG's development set
  with the first reference as the hypothesis. The paper's TER is that much higher by definition.
"""

import importlib.util
import re
from collections.abc import Sequence

from lora_jax.metrics import coco, java, ngrams
from lora_jax.metrics.nlg import Measured, check_hypotheses, check_references
from lora_jax.metrics.segments import SegmentStatistics
from lora_jax.metrics.ter import mean_ter, ter

METRICS = ("bleu", "meteor", "ter", "mean_ter")
MAX_REFERENCES = 6


def tokenize(text: str) -> str:
  """Returns a text lowercased, its words and other characters separated by spaces.

  >>> tokenize("Eve's 3.5-acre farm")
  "eve ' s 3 . 5 - acre farm"
  """
  return " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))


def measure(
  systems: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> list[Measured]:
  """Returns the segments' statistics of several systems over the same inputs, by `METRICS`.

  All are in percent; of TER and mean TER, lower is better. `bootstrap.intervals` and `differences`
  take the result.

  Args:
    systems: for each system, one text for each input.
    references: for each input its references, at least one, of which the first six count.
  Raises:
    ValueError: if there are no inputs, they do not pair up, or a reference has no word.
  """
  check_references(references)
  for hypotheses in systems:
    check_hypotheses(hypotheses, references)
  texts = [[tokenize(text) for text in group[:MAX_REFERENCES]] for group in references]
  tokenized = [[tokenize(text) for text in hypotheses] for hypotheses in systems]
  columns: dict[str, list[SegmentStatistics]] = {}
  missing: dict[str, str] = {}
  if importlib.util.find_spec("sacrebleu") is None:
    reason = "sacrebleu was not found; pip install lora-jax[metrics]"
    missing |= dict.fromkeys(("bleu", "ter", "mean_ter"), reason)
  else:
    for name, function in (("bleu", ngrams.bleu), ("ter", ter), ("mean_ter", mean_ter)):
      columns[name] = [function(hypotheses, texts) for hypotheses in tokenized]
  if reason := java.why_missing():
    missing["meteor"] = reason
  else:
    columns["meteor"] = coco.meteor_by_system(tokenized, texts)
  return [
    Measured({name: columns[name][i] for name in METRICS if name in columns}, dict(missing))
    for i in range(len(systems))
  ]
