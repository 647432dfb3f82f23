"""The table of variants and layer kinds in docs/variants.md.

    python -m tests.variant_kinds [--verdicts FILE] [VARIANT ...]

It runs every variant on every kind (20 minutes on 2 cores): the output with drawn arrays is
compared with the merged model's. A cell is `yes`, or the number of the refusal below the table.
An interrupted run continues from FILE, which has a line for each pair that was run.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

import lora_jax as lj

from tests import conftest  # noqa: F401 - 8 devices, before the first of layer_kinds
from tests.layer_kinds import CODE, KINDS, LayerKind
from tests.variants.test_variants import ROUNDED, VARIANTS, randomized

WORKS = "yes"


def status(name: str, kind: LayerKind) -> str:
  """Returns `WORKS`, or the words of the refusal.

  Raises:
    AssertionError: if the output is not the merged model's.
  """
  try:
    case = kind.build()
    variant = VARIANTS[name]
    config = lj.LoraConfig(case.rank, 3.0, case.target, rules=case.rules, variant=variant)
    adaptation = lj.lora(case.fn, config, opaque=case.opaque)
    trainable = randomized(adaptation.init(jax.random.key(0), case.params, *case.args))

    def outputs(trainable):
      out = adaptation.apply(case.params, trainable, *case.args)
      return out, case.fn(adaptation.merge(case.params, trainable), *case.args)

    out, expected = jax.jit(outputs)(trainable)
  except (lj.UnsupportedOperation, ValueError) as error:
    return reason(str(error))
  scale = float(jnp.abs(expected).max())
  tolerance = ROUNDED.get((name, str(kind)), kind.tolerance)
  assert float(jnp.abs(out - expected).max()) <= tolerance * scale, f"{name} on {kind}"
  return WORKS


def reason(message: str) -> str:
  """Returns the first sentence of a message, without paths, shapes and lines of code."""
  text = re.sub(r"^(cannot adapt )?[\w/~'\"\[\]]+( and [\w/]+)*: ", "", message.split("\n")[0])
  text = re.sub(r"(, of size \d+)? \(shape \([^)]*\)\)|, \d+ x \d+", "", text)
  text = re.sub(r"'\w+' is applied to it at \S+ \([^)]*\), and ", "", text)
  text = re.sub(r"\d+ (inputs\b|outputs\b)", r"\1", text)
  sentence = re.split(r"\. |; ", text)[0].rstrip(".").strip()
  return re.sub(r"axis \d+", "axis", sentence)


def verdicts(names: Iterable[str], path: pathlib.Path | None) -> dict[tuple[str, str], str]:
  """Runs the pairs that the file lacks, and appends them to it."""
  lines = path.read_text("utf-8").splitlines() if path and path.exists() else []
  known = {(name, kind): words for name, kind, words in map(json.loads, lines)}
  for kind in KINDS:
    for name in names:
      if (name, str(kind)) not in known:
        known[name, str(kind)] = words = status(name, kind)
        if path:
          with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, str(kind), words]) + "\n")
  return known


def table(names: Iterable[str], known: Mapping[tuple[str, str], str]) -> str:
  """Returns the table in Markdown, with the refusals below it."""
  names, refusals = list(names), {}
  lines = [f"| | {' | '.join(f'`{name}`' for name in names)} |", "|---|" + "---|" * len(names)]
  for kind in KINDS:
    cells = []
    for name in names:
      words = known[name, str(kind)]
      cells.append(
        WORKS if words == WORKS else f"({refusals.setdefault(words, len(refusals) + 1)})"
      )
    lines.append(f"| {label(kind)} | {' | '.join(cells)} |")
  lines += ["", *(f"{number}. {words}" for words, number in refusals.items())]
  return "\n".join(lines).strip()


def label(kind: LayerKind) -> str:
  return CODE.sub(r"`\g<0>`", str(kind))


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("variants", nargs="*", default=[*VARIANTS])
  parser.add_argument("--verdicts", type=pathlib.Path, help="the file of an interrupted run")
  args = parser.parse_args(arguments)
  for name in args.variants:
    if name not in VARIANTS:
      parser.error(f"the variants must be of {', '.join(VARIANTS)}, got {name!r}")
  print(table(args.variants, verdicts(args.variants, args.verdicts)))


if __name__ == "__main__":
  main()
