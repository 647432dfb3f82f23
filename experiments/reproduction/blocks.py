"""The parts of a report, as Markdown and as one HTML file without links to anything else."""

import base64
import html
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.harness.table import aligned

Rows = Sequence[Sequence[str]]


class Heading(NamedTuple):
  text: str
  level: int


class Text(NamedTuple):
  text: str


class Table(NamedTuple):
  """A table whose first row is its header."""

  rows: Rows


class Image(NamedTuple):
  """A PNG file's content, and what it shows."""

  content: bytes
  caption: str


Block = Heading | Text | Table | Image


def markdown(parts: Sequence[Block], figures: Path) -> str:
  """Returns the report as Markdown, and writes its images to a folder beside it."""
  numbers = itertools.accumulate(isinstance(part, Image) for part in parts)
  pairs = zip(parts, numbers, strict=True)
  return "\n\n".join(_markdown(part, figures / f"{number}.png") for part, number in pairs) + "\n"


def _markdown(block: Block, figure: Path) -> str:
  match block:
    case Heading(text, level):
      return f"{'#' * level} {text}"
    case Text(text):
      return text
    case Table(rows):
      return aligned([[cell.replace("|", "\\|") for cell in row] for row in rows])
    case Image():
      figure.parent.mkdir(parents=True, exist_ok=True)
      figure.write_bytes(block.content)
      return f"![{block.caption}]({figure.parent.name}/{figure.name})"


def _data_uri(image: Image) -> str:
  return f"data:image/png;base64,{base64.b64encode(image.content).decode()}"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
table { border-collapse: collapse; font-size: 0.85rem }
th, td { border-bottom: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left;
  vertical-align: top }
.scroll { overflow-x: auto; margin: 1rem 0 }
img { max-width: 100%; height: auto }
"""


def page(parts: Sequence[Block], title: str) -> str:
  """Returns the report as HTML."""
  body = "\n".join(map(_html, parts))
  head = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    f"<title>{html.escape(title)}</title>"
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<style>{STYLE}</style></head>"
  )
  return f"{head}<body><main>\n{body}\n</main></body></html>\n"


def _html(block: Block) -> str:
  match block:
    case Heading(text, level):
      return f"<h{level}>{html.escape(text)}</h{level}>"
    case Text(text):
      return f"<p>{_marked(html.escape(text))}</p>"
    case Table(rows):
      return _html_table(rows)
    case Image():
      caption = html.escape(block.caption)
      image = f'<img src="{_data_uri(block)}" alt="{caption}">'
      return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _marked(text: str) -> str:
  """Returns a text whose Markdown for emphasis and code is HTML."""
  text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
  return re.sub(r"(?<!\w)\*([^*]+)\*(?!\w)", r"<em>\1</em>", text)


def _html_table(rows: Rows) -> str:
  head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in rows[0])
  lines = []
  for name, *cells in rows[1:]:
    values = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{values}</tr>')
  table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
  return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'
