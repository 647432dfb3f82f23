"""Generates text with the model of a finished run: one answer for each prompt.

    python -m experiments.generate runs/gpt2_e2e/mini "name : Blue Spice | Type : pub"
    python -m experiments.generate runs/finetune/RUN "Translate: cat" "Translate: dog"
    python -m experiments.generate runs/finetune/RUN --chat "Hi" --temperature=0.7 --top_p=0.9
    python -m experiments.generate --file=prompts.jsonl    # {"run": FOLDER, "prompt": "..."}

A prompt has the format of the run's data: an input of E2E, a `prompt` of your file, or with
`--chat` the message of a user. Runs of gpt2_e2e, finetune (by any method) and gpt2_pretrain
generate text; runs of glue classify it. The lines of a file may name different runs of finetune
with one base model: one batch has prompts of all, each answered with its run's adapter.

Time: 10 s for one prompt on 2 CPU cores with the embedded base model, nearly all to start.
Expect: the answers; of several prompts each after its prompt.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.launch import explained, make_parser
from experiments.nlg.generation import (
  Sampling,
  check_prompts,
  load_generator,
  load_generator_of_runs,
)
from lora_jax.fields import NonEmptyPath, read_value
from lora_jax.files import parse_json, read_lines


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = make_parser("generate", __doc__, argument_default=argparse.SUPPRESS)
  parser.add_argument("folder", nargs="?", help="the folder of a finished run")
  parser.add_argument("prompts", nargs="*", help="the prompts, each in quotation marks")
  parser.add_argument("--file", help='lines {"run": FOLDER, "prompt": ...} instead of both')
  parser.add_argument("--chat", action="store_true", help="prompts are messages of a user")
  parser.add_argument("--max_new_tokens", type=int, help="the longest answer; default 64")
  parser.add_argument("--temperature", type=float, help="0, the default, is greedy")
  parser.add_argument("--top_p", type=float, help="samples among the likeliest tokens; default 1")
  parser.add_argument("--seed", type=int, help="of the samples; default 0")
  parser.add_argument("--batch_size", type=int, help="prompts answered at once; default 8")
  options = vars(parser.parse_intermixed_args(arguments))
  names = [field.name for field in dataclasses.fields(Sampling)]
  with explained():
    sampling = Sampling(**{name: options[name] for name in names if name in options})
    prompts, answers = answer_prompts(options, sampling)
  if "" in answers:
    hint = "" if "chat" in options else ". A model trained on messages answers them with --chat"
    print(
      f"note: an empty answer means that the model generated its end token first{hint}",
      file=sys.stderr,
    )
  if len(answers) == 1:
    print(answers[0])
    return
  for prompt, answer in zip(prompts, answers, strict=True):
    print(f"> {prompt}\n{answer}\n")


def answer_prompts(options: Mapping[str, Any], sampling: Sampling) -> tuple[list[str], list[str]]:
  """Returns the prompts and their answers.

  Raises:
    ValueError: if there is neither a file nor a folder with prompts, or both.
  """
  folder, prompts = options.get("folder"), options.get("prompts", [])
  chat = options.get("chat", False)
  if ("file" in options) == (folder is not None) or (folder is not None) != bool(prompts):
    raise ValueError("give the folder of a run and prompts, or --file=prompts.jsonl")
  if folder is not None:
    check_prompts(prompts)
    folder = read_value(NonEmptyPath, folder, "the folder of a run")
    return prompts, load_generator(folder, chat).answer(prompts, sampling)
  runs, prompts = read_prompts(read_value(NonEmptyPath, options["file"], "--file"))
  check_prompts(prompts)
  folders = list(dict.fromkeys(runs))
  generator = load_generator_of_runs(folders, chat)
  return prompts, generator.answer(prompts, sampling, [folders.index(run) for run in runs])


def read_prompts(path: str | Path) -> tuple[list[str], list[str]]:
  """Returns the runs and the prompts of a file's lines.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming a line that is not {"run": ..., "prompt": ...}, or a file without lines.
  """
  pairs = []
  for where, line in read_lines(path):
    values = parse_json(line, where)
    if not isinstance(values, dict) or set(values) != {"run", "prompt"}:
      raise ValueError(f'{where}: expected {{"run": ..., "prompt": ...}}, got {line:.100}')
    pairs.append([read_value(str, values[name], f"{where}: {name}") for name in ("run", "prompt")])
  if not pairs:
    raise ValueError(f"{path} has no lines")
  runs, prompts = zip(*pairs, strict=True)
  return list(runs), list(prompts)


if __name__ == "__main__":
  main()
