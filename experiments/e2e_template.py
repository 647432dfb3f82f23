"""Scores a baseline without training: E2E texts by a fixed template.

    python -m experiments.e2e_template [--workdir=runs/e2e_template]

The template follows the meaning of the slots and the wording of the training texts; it was not
tuned on the test set.

Time: 31 s on 2 busy CPU cores, most of it for the metrics.
Expect: BLEU 63.34 on the 630 test inputs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.launch import explained, make_parser
from experiments.harness.workdir import commit, run_once
from experiments.nlg.config import TemplateConfig
from experiments.nlg.e2e import decoded_inputs, score
from experiments.nlg.scores import markdown
from experiments.nlg.tasks.e2e import E2E
from lora_jax.metrics.slots import parse_slots

RATINGS = {"1 out of 5", "3 out of 5", "5 out of 5"}
PRICES = {"less than £ 20", "£ 20 - 25", "more than £ 30"}


def describe(slots: Mapping[str, str]) -> str:
  """Returns a text for the slots of an input, with spaces around punctuation as in the data.

  >>> describe({"name": "The Vaults", "Type": "pub", "price": "more than £ 30"})
  'The Vaults is a pub with a price range of more than £ 30 .'
  """
  name, family = slots["name"], slots.get("family friendly")
  kind = slots.get("Type", "restaurant")
  noun = f"family friendly {kind}" if family == "yes" else kind
  text = f"{name} is {_a(noun)}"
  if "food" in slots:
    text += f" that serves {'fast' if slots['food'] == 'Fast food' else slots['food']} food"
  if "price" in slots:
    price = slots["price"]
    exact = price in PRICES
    text += f" with a price range of {price}" if exact else f" with {_a(price)} price range"
  sentences = [text]
  if "customer rating" in slots:
    rating = slots["customer rating"]
    exact = rating in RATINGS
    described = f"a customer rating of {rating}" if exact else f"{_a(rating)} customer rating"
    sentences.append(f"It has {described}")
  place = {"city centre": "in the city centre", "riverside": "in the riverside area"}
  where = [place[slots["area"]]] if "area" in slots else []
  where += [f"near {slots['near']}"] if "near" in slots else []
  closing = [f"is located {' '.join(where)}"] if where else []
  closing += ["is not family friendly"] if family == "no" else []
  if closing:
    sentences.append(f"It {' and '.join(closing)}")
  return " . ".join(sentences) + " ."


def _a(noun: str) -> str:
  return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def run(config: TemplateConfig) -> dict[str, Any]:
  """Writes and scores one text for each input. A finished run is not repeated."""
  result = run_once(config, lambda workdir: _run(config, workdir))
  print(markdown([result], E2E.metrics))
  return result


def _run(config: TemplateConfig, workdir: Path) -> dict[str, Any]:
  data, inputs = config.data, config.decoding
  groups = decoded_inputs(data, inputs.split, inputs.num_inputs)
  texts = [describe(parse_slots(group.context)) for group in groups]
  return {
    "experiment": config.experiment,
    "variant": config.variant,
    "method": config.method,
    "seed": config.seed,
    "num_train_records": 0,
    "trainable_parameters": 0,
    "valid_loss": None,
    **score(texts, groups, workdir, data, inputs),
    "commit": commit(),
  }


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("e2e_template", __doc__)
  parser.add_argument("--workdir", default="runs/e2e_template", help="the folder to write")
  options = parser.parse_args(arguments)
  with explained():
    run(TemplateConfig(workdir=options.workdir))


if __name__ == "__main__":
  main()
