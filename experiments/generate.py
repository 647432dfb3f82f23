"""Generates text with the model of a finished run: one answer for each prompt.

    python -m experiments.generate runs/gpt2_e2e/mini "name : Blue Spice | Type : pub"
    python -m experiments.generate runs/finetune/RUN "Translate: cat" "Translate: dog"
    python -m experiments.generate runs/finetune/RUN --chat "Hi" --temperature=0.7 --top_p=0.9

A prompt has the format of the run's data: an input of E2E, a `prompt` of your file, or with
`--chat` the message of a user. Runs of gpt2_e2e, finetune (by any method) and gpt2_pretrain
generate text; runs of glue classify it.

Time: 10 s for one prompt on 2 CPU cores with the embedded base model, nearly all to start.
Expect: the answers; of several prompts each after its prompt.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from experiments.harness.launch import explained, make_parser
from experiments.nlg.generation import Sampling, check_prompts, load_generator
from lora_jax.fields import NonEmptyPath, read_value


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("generate", __doc__, argument_default=argparse.SUPPRESS)
  parser.add_argument("folder", help="the folder of a finished run")
  parser.add_argument("prompts", nargs="+", help="the prompts, each in quotation marks")
  parser.add_argument("--chat", action="store_true", help="prompts are messages of a user")
  parser.add_argument("--max_new_tokens", type=int, help="the longest answer; default 64")
  parser.add_argument("--temperature", type=float, help="0, the default, is greedy")
  parser.add_argument("--top_p", type=float, help="samples among the likeliest tokens; default 1")
  parser.add_argument("--seed", type=int, help="of the samples; default 0")
  parser.add_argument("--batch_size", type=int, help="prompts answered at once; default 8")
  options = vars(parser.parse_args(arguments))
  names = [field.name for field in dataclasses.fields(Sampling)]
  with explained():
    sampling = Sampling(**{name: options[name] for name in names if name in options})
    check_prompts(options["prompts"])
    folder = read_value(NonEmptyPath, options["folder"], "the folder of a run")
    generator = load_generator(folder, options.get("chat", False))
    answers = generator.answer(options["prompts"], sampling)
  if "" in answers:
    hint = "" if "chat" in options else ". A model trained on messages answers them with --chat"
    print(
      f"note: an empty answer means that the model generated its end token first{hint}",
      file=sys.stderr,
    )
  if len(answers) == 1:
    print(answers[0])
    return
  for prompt, answer in zip(options["prompts"], answers, strict=True):
    print(f"> {prompt}\n{answer}\n")


if __name__ == "__main__":
  main()
