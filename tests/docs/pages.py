"""The documentation pages, for the tests of their code, tables and links."""

import re

from tests.paths import ROOT

DOCS = ROOT / "docs"


def page(name: str) -> str:
  """Returns the text of docs/NAME.md."""
  return (DOCS / f"{name}.md").read_text("utf-8")


def code_blocks(text: str) -> list[str]:
  """Returns the Python code of a page, one string per block."""
  return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
