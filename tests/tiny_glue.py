"""A folder in the format of GLUE and SuperGLUE, with examples written for these tests."""

import json
from pathlib import Path

MNLI_TEXTS = ("index", "promptID", "pairID", "genre", "sentence1_binary_parse")
MNLI_TEXTS += ("sentence2_binary_parse", "sentence1_parse", "sentence2_parse")
MNLI_TEXTS += ("sentence1", "sentence2")
WORDS = ("red", "blue", "old", "new", "tall", "small", "good", "bad")


def write_table(path: Path, *rows: tuple[object, ...], end: str = "\n", mark: str = "") -> None:
  """Writes rows with tabs between their fields."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = end.join("\t".join(map(str, row)) for row in rows) + end
  path.write_bytes((mark + text).encode())


def write_glue(folder: Path) -> Path:
  """Writes a few lines of every task of GLUE, quirks and all; returns the folder."""
  for split in ("train", "dev"):
    rows = [
      ("gj04", i % 2, "" if i % 2 else "*", f'The "{a} {b}" man.')
      for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)
    ]
    write_table(folder / "CoLA" / f"{split}.tsv", *rows[: 40 if split == "train" else 11])
    pair = ("index", "sentence1", "sentence2", "label")
    names = ("entailment", "not_entailment")
    pairs = [
      (i, f"It is {a}.", f"It is {b}, {a}.", names[i % 2]) for i, (_, _, a, b) in _numbered()
    ]
    write_table(folder / "RTE" / f"{split}.tsv", pair, *pairs)
    write_table(
      folder / "WNLI" / f"{split}.tsv", pair, *((*p[:3], i % 2) for i, p in enumerate(pairs))
    )
    texts = ("index", "question", "sentence", "label")
    write_table(folder / "QNLI" / f"{split}.tsv", texts, *pairs)
    write_table(folder / "SST-2" / f"{split}.tsv", ("sentence", "label"), ('a " b ', 1), ("c", 0))
    heads = ("index", "genre", "filename", "year", "old_index", "source1", "source2")
    scores = [
      (i, "g", "f", "y", "0", "none", "none", p[1], p[2], f"{i % 6:.3f}")
      for i, p in enumerate(pairs)
    ]
    write_table(
      folder / "STS-B" / f"{split}.tsv", (*heads, "sentence1", "sentence2", "score"), *scores
    )
    ids = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    rows = [(i % 2, i, i + 1, p[1], p[2]) for i, p in enumerate(pairs)]
    write_table(folder / "MRPC" / f"{split}.tsv", ids, *rows, mark="\ufeff")
    ids = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    rows = [(i, 1, 2, p[1], p[2], i % 2) for i, p in enumerate(pairs)]
    write_table(folder / "QQP" / f"{split}.tsv", ids, *rows)
  names = ("entailment", "neutral", "contradiction")
  for name, gold in (("train", 1), ("dev_matched", 5), ("dev_mismatched", 5)):
    head = (*MNLI_TEXTS, *(f"label{i + 1}" for i in range(gold)), "gold_label")
    rows = [
      (i, *"abcdefg", a, b, *["neutral"] * gold, names[i % 3]) for i, (_, _, a, b) in _numbered()
    ]
    write_table(folder / "MNLI" / f"{name}.tsv", head, *rows)
  write_table(folder / "CoLA" / "test.tsv", ("index", "sentence"), (0, "Bill."))
  head = ("index", "#1 ID", "#2 ID", "#1 String", "#2 String")
  write_table(
    folder / "MRPC" / "test.tsv", head, (0, 1, 2, "A .", "B ."), mark="\ufeff", end="\r\n"
  )
  return folder


def _numbered():
  pairs = [(a, b) for a in WORDS for b in WORDS][:20]
  return list(enumerate((0, 0, a, b) for a, b in pairs))


SUPERGLUE = {
  "BoolQ": [{"question": "is it so", "passage": "It is.", "idx": 0, "label": True}],
  "CB": [{"premise": "A.", "hypothesis": "B.", "label": "neutral", "idx": 0}],
  "COPA": [
    {
      **{"premise": "It rained.", "choice1": "I got wet.", "choice2": "I slept."},
      **{"question": "effect", "label": 0, "idx": 0},
    },
    {
      **{"premise": "I got wet.", "choice1": "I slept.", "choice2": "It rained."},
      **{"question": "cause", "label": 1, "idx": 1},
    },
  ],
  "MultiRC": [
    {
      "idx": 0,
      "version": 1.1,
      "passage": {
        "text": "Ann sat. Bob ran.",
        "questions": [
          {
            "question": "Who sat?",
            "idx": 0,
            "answers": [
              {"text": "Ann", "idx": 0, "label": 1},
              {"text": "Bob", "idx": 1, "label": 0},
            ],
          },
          {
            "question": "Who ran?",
            "idx": 1,
            "answers": [{"text": "Bob", "idx": 2, "label": 1}],
          },
        ],
      },
    }
  ],
  "ReCoRD": [
    {
      "source": "Daily mail",
      "passage": {
        "text": "Ann met Bob.",
        "entities": [{"start": 8, "end": 10}, {"start": 0, "end": 2}],
      },
      "qas": [
        {
          "query": "Bob was met by @placeholder .",
          "answers": [{"start": 0, "end": 2, "text": "Ann"}],
          "idx": 7,
        }
      ],
      "idx": 3,
    }
  ],
  "RTE": [{"premise": "A.", "hypothesis": "B.", "label": "not_entailment", "idx": 0}],
  "WiC": [
    {
      **{"word": "place", "sentence1": "A place.", "sentence2": "To place.", "idx": 0},
      **{"label": False, "start1": 2, "start2": 3, "end1": 7, "end2": 8, "version": 1.1},
    }
  ],
  "WSC": [
    {
      "text": "Mark told Pete that he left.",
      "target": {
        **{"span2_index": 4, "span1_index": 0, "span1_text": "Mark", "span2_text": "he"},
      },
      "idx": 0,
      "label": True,
    }
  ],
}
"""Made-up examples in the published format of each task."""


def write_superglue(folder: Path) -> Path:
  """Writes the lines as training and validation files; returns the folder."""
  for name, lines in SUPERGLUE.items():
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
      text = "".join(json.dumps(line) + "\n" for line in lines)
      (folder / name / f"{split}.jsonl").write_text(text)
  return folder
