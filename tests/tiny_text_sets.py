"""Folders in the formats of SAMSum, WikiSQL and a subset of MNLI, written for these tests."""

import csv
import json
from pathlib import Path

CHATS = (
  (
    'Ann: I baked "cookies", want some?\nBen: Sure 🙂\nAnn: See you at 5.\nBen: Bye\nAnn: Bye',
    "Ann baked cookies and Ben wants some. ",
  ),
  ("Cem: Is the lake open?\nDee: Until noon.", "The lake is open until noon, says Dee."),
  ("Eve: Late again, sorry!\nFay: No problem.\nEve: Ten minutes.", "Eve is ten minutes late."),
  ("Gus: <file_photo>\nHal: Nice café!\nGus: In Łódź.\nHal: Envy", "Gus is at a café in Łódź."),
  ("Ida: Tea?\nJon: Coffee, please, no milk.", "Jon wants coffee without milk."),
)

QUESTIONS = (
  ("What is the largest area?", "1-1-1", "SELECT MAX [area (km²)] FROM table"),
  (
    "How deep is Lake Ann in Peru?",
    "1-1-1",
    'SELECT [depth] FROM table WHERE [name] = "Lake Ann" AND [country] = Peru',
  ),
  (
    "How many lakes are deeper than 90?",
    "1-1-1",
    "SELECT COUNT [name] FROM table WHERE [depth] > 90",
  ),
  (
    "What number is the song called “Rain”?",
    "2-7-1",
    'SELECT NO._IN_SET_FIELD FROM table WHERE [title] = "\\"Rain\\""',
  ),
  ("Who wrote song 4?", "2-7-1", "SELECT [writer [b ]] FROM table WHERE NO._IN_SET_FIELD = 4"),
  (
    "Which song scored 7 + 8 = 15?",
    "2-7-1",
    'SELECT [title] FROM table WHERE [score [a ] (sum)] = "7 + 8" = 15 AND NO._IN_SET_FIELD < 9',
  ),
  ("What is the average crowd?", "2-9-4", "SELECT AVG [crowd] FROM table WHERE [year] = 1999"),
  ("Where did it rain?", "2-9-4", "SELECT [venue] FROM table WHERE [weather] = rain"),
)

PAIRS = (
  ("A man sleeps.", "He is awake.", "contradiction"),
  ("A dog runs in the park.", "An animal is outside.", "entailment"),
  ("Two girls sing.", "They sing in a choir.", "neutral"),
  ("The shop is closed. ", "The shop is open.", "contradiction"),
)


def write_samsum(folder: Path) -> Path:
  """Writes the chats as the training and test set; returns the folder."""
  for name in ("train.csv", "test.csv"):
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
      writer = csv.writer(file, lineterminator="\n")
      writer.writerow(["id", "dialogue", "summary"])
      writer.writerows((100 + i, *chat) for i, chat in enumerate(CHATS))
  return folder


def write_wikisql(folder: Path) -> Path:
  """Writes the questions as the training and test set; returns the folder."""
  lines = [
    json.dumps({"question": q, "table_id": t, "sql": s, "value_from_template": False})
    for q, t, s in QUESTIONS
  ]
  for name in ("train.jsonl", "test.jsonl"):
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
  return folder


def write_mnli_subset(folder: Path) -> Path:
  """Writes the pairs as both splits; returns the folder."""
  rows = {
    str(i): {"text_a": a, "text_b": b, "label": label} for i, (a, b, label) in enumerate(PAIRS)
  }
  for name in ("train.json", "dev.json"):
    (folder / name).write_text(json.dumps(rows, indent=4))
  return folder
