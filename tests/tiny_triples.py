"""Files in the formats of WebNLG and DART, with facts and sentences written for these tests."""

import json
from pathlib import Path
from typing import Any

TRAIN = [  # category, triples, texts, and a text of the comment "toFix"
  ("City", [("Aville", "river", "Bee")], ["Aville is on the Bee.", "The Bee flows by Aville."], ""),
  ("Food", [("Soup", "country", "Ceeland")], ["Soup is from Ceeland ."], "soup Ceeland"),
  ("Food", [("Soup", "country", "Ceeland"), ("Soup", "course", '"first"')], ["A soup."], ""),
  ("Airport", [("A_Airport", "location", "Aville")], [], "Airport at."),
]
TEST = [
  ("City", [("Dtown", "river", "Bee")], ["Dtown is on the Bee.", "The Bee flows by Dtown."], ""),
  ("Artist", [("Eve_É", "genre", "Jazz")], ["Eve É plays jazz."], ""),
  ("Politician", [("Fay", "party", "None")], ["Fay has no party.", "Fay is in no party."], ""),
]
DART = [
  ([["Al", "BIRTH_PLACE", "Bee"], ["Al", "AGE", "9"]], ["Al, 9, is from Bee."]),
  ([["Cy", "AGE", "8"]], ["Cy is 8.", "Cy's age is 8."]),
  ([["Cy", "Age", "8"]], ["Cy is 8."]),
  ([["Di", "TEAM", "É"]], ["Di plays for É.", ""]),
]


def webnlg_entry(
  number: int, category: str, facts: list[tuple[str, str, str]], texts: list[str], unfit: str = ""
) -> dict[str, Any]:
  """Returns an entry of WebNLG's JSON files."""
  names = ("subject", "property", "object")
  comments = [(text, "good") for text in texts] + ([(unfit, "toFix")] if unfit else [])
  return {
    str(number): {
      "category": category,
      "lexicalisations": [
        {"comment": comment, "lang": "", "lex": text, "xml_id": f"Id{i}"}
        for i, (text, comment) in enumerate(comments, start=1)
      ],
      "modifiedtripleset": [dict(zip(names, fact, strict=True)) for fact in facts],
      "size": str(len(facts)),
      "xml_id": f"Id{number}",
    }
  }


def write_webnlg(folder: Path) -> Path:
  """Writes the three files of WebNLG; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, rows in (("train", TRAIN), ("dev", TRAIN[:1]), ("test", TEST)):
    entries = [webnlg_entry(i, *row) for i, row in enumerate(rows, start=1)]
    (folder / f"{name}.json").write_text(json.dumps({"entries": entries}), "utf-8")
  return folder


def dart_entries() -> list[dict[str, Any]]:
  """Returns entries of DART; the last one has an empty text."""
  return [
    {
      "tripleset": [list(fact) for fact in facts],
      "annotations": [{"source": "ours", "text": text} for text in texts],
    }
    for facts, texts in DART
  ]


def write_dart(folder: Path) -> Path:
  """Writes DART's development set, a list, and its test set, of lines; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  entries = [
    {"tripleset": [[f"N{i}", "AGE", "7"]], "annotations": [{"source": "ours", "text": f"N{i}."}]}
    for i in range(20)
  ]
  (folder / "dart-v1.1.1-full-dev.json").write_text(json.dumps(entries + entries[:1]), "utf-8")
  lines = "".join(json.dumps(entry) + "\n" for entry in dart_entries())
  (folder / "test.jsonl").write_text(lines.replace('""', "null"), "utf-8")
  return folder
