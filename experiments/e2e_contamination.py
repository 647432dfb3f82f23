"""Tests whether a model has memorized texts of the E2E test set.

    python -m experiments.e2e_contamination --model=smollm2 [--count=100]

One official reference of each input is cut into halves; the first half names the restaurant. It is
compared with the same reference under the name of another restaurant:

- the greedy completion of the first half: how many words it has in common with the second half;
- the loss of the second half, whose tokens are the same for both names.

A model that has memorized the texts completes more words, with a lower loss, under the true names.
A small difference proves nothing: a name alone can fit a text better (a coffee shop's). No
difference proves nothing either: a model may have read the texts without memorizing them. Intervals
are by bootstrap over the texts.

Time: 71 s for 20 texts with SmolLM2 on 2 busy CPU cores; the 100 of docs/smollm2.md were not timed.
Expect: a table of three rows, each with the true names, the other names and their difference.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness.launch import explained, make_parser
from experiments.nlg.user_data import Text, load_text
from lora_jax.data.jsonl import Completion, encode_completions, encode_prompts
from lora_jax.data.sets import e2e
from lora_jax.data.text import Example
from lora_jax.decoding import SamplingConfig, from_linen, generate
from lora_jax.fields import Within, read_value
from lora_jax.metrics.bootstrap import percentile_interval
from lora_jax.models.zoo import LanguageModel, load_causal_lm

Texts = Annotated[int, Within("[2, 600]")]
BATCH_SIZE = 20  # texts
MAX_NEW_TOKENS = 40
RESAMPLES, CONFIDENCE = 10_000, 0.95


class Halves(NamedTuple):
  """A text in two parts; only the first has the restaurant's name."""

  first: str
  second: str


class Row(NamedTuple):
  """One measure of all texts, under the true names and under others."""

  name: str
  true: np.ndarray
  swapped: np.ndarray


def halve(groups: Sequence[e2e.Group]) -> tuple[list[Halves], list[Halves]]:
  """Returns the texts in halves, and the same texts under the names of other restaurants.

  Each input contributes its first reference with the name in the first half only. Each name is
  replaced by the next in alphabetical order, the last by the first.
  """
  chosen = []
  for group in groups:
    name = re.findall(r"name\[(.*?)\]", group.context)[0]
    for reference in group.references:
      starts = [word.start() for word in re.finditer(r"\S+", reference)]
      middle = starts[len(starts) // 2]
      first, second = reference[:middle].strip(), reference[middle:].strip()
      if name in first and name not in second:
        chosen.append((name, Halves(first, second)))
        break
  names = sorted({name for name, _ in chosen})
  others = dict(zip(names, [*names[1:], *names[:1]], strict=True))
  swapped = [text._replace(first=text.first.replace(name, others[name])) for name, text in chosen]
  return [text for _, text in chosen], swapped


def common_words(generated: str, expected: str) -> int:
  """Returns how many words two texts have in common from their start.

  >>> common_words("is a pub near the river", "is a pub in the city")
  3
  """
  pairs = zip(generated.split(), expected.split(), strict=False)
  return next(
    (i for i, (a, b) in enumerate(pairs) if a != b),
    min(len(generated.split()), len(expected.split())),
  )


def measure(model: LanguageModel, text: Text, halves: Sequence[Halves]) -> dict[str, np.ndarray]:
  """Returns for each text the words in common, whether it was completed, and its loss."""
  prompts = encode_prompts(text.tokenizer, [part.first for part in halves], text.end_id)
  decoder = from_linen(model.module, model.init_cache, model.num_slots)
  search = SamplingConfig(eos_ids=text.end_ids, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
  outputs = generate(decoder, model.params, prompts, search, batch_size=BATCH_SIZE)
  generated = [text.tokenizer.decode(ids) for ids in outputs]
  pairs = [(line, part.second) for line, part in zip(generated, halves, strict=True)]
  common = np.array([common_words(line, second) for line, second in pairs])
  return {
    "words in common": common,
    "completed, share": np.array(
      [n == len(s.split()) for n, (_, s) in zip(common, pairs, strict=True)]
    ),
    "loss, nats per token": losses(model, text, halves),
  }


def losses(model: LanguageModel, text: Text, halves: Sequence[Halves]) -> np.ndarray:
  """Returns the mean loss of each second half's tokens after its first half, in nats."""
  records = [Completion("E2E", part.first, f" {part.second}") for part in halves]
  examples = encode_completions(text.tokenizer, records, text.end_id, model.num_positions)
  length = max(len(example.tokens) for example in examples)

  @jax.jit
  def loss(params: Any, tokens: Any) -> Any:
    logits = model.call(params, tokens)[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

  means = []
  for start in range(0, len(examples), BATCH_SIZE):
    part = examples[start : start + BATCH_SIZE]
    tokens = np.zeros((BATCH_SIZE, length), np.int32)
    for row, example in zip(tokens, part, strict=False):
      row[: len(example.tokens)] = example.tokens
    by_token = np.asarray(loss(model.params, tokens))
    means += [_mean(row, example) for row, example in zip(by_token, part, strict=False)]
  return np.array(means)


def _mean(by_token: np.ndarray, example: Example) -> float:
  """Returns the mean over an example's supervised tokens except the end token."""
  return float(by_token[example.target_index[:-1]].mean())


def interval(values: np.ndarray) -> tuple[float, float]:
  """Returns the bootstrap interval of a mean."""
  draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
  return percentile_interval(values[draws].mean(1), CONFIDENCE)


def table(rows: Sequence[Row]) -> str:
  """Returns the measures as a Markdown table."""
  lines = [
    "| mean over the texts | true name | other name | difference (95 %) |",
    "|---|--:|--:|--:|",
  ]
  for name, true, swapped in rows:
    difference = true.astype(float) - swapped
    low, high = interval(difference)
    lines.append(
      f"| {name} | {true.mean():.3f} | {swapped.mean():.3f} | {difference.mean():+.3f} "
      f"({low:+.3f} to {high:+.3f}) |"
    )
  return "\n".join(lines)


def choose(count: int) -> tuple[list[Halves], list[Halves]]:
  """Returns the halves of texts spread evenly over the test set, which is sorted by name."""
  both = halve(e2e.grouped(e2e.read("test", "official")))
  places = np.linspace(0, len(both[0]) - 1, count).astype(int)
  true, swapped = ([halves[i] for i in places] for halves in both)
  return true, swapped


def run(name: str, count: int) -> list[Row]:
  """Returns the measures of a model on `count` texts of the test set."""
  halves = choose(read_value(Texts, count, "--count"))
  model = load_causal_lm(name)
  text = load_text(model, chats=False)
  true, swapped = (measure(model, text, part) for part in halves)
  return [Row(key, true[key], swapped[key]) for key in true]


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("e2e_contamination", __doc__)
  parser.add_argument("--model", required=True, help="a folder, a GGUF file, or a named model")
  parser.add_argument("--count", type=int, default=100, help="texts of the test set; default 100")
  options = parser.parse_args(arguments)
  with explained():
    rows = run(options.model, options.count)
    print(f"{len(rows[0].true)} texts of the E2E test set, {options.model}\n\n{table(rows)}")


if __name__ == "__main__":
  main()
