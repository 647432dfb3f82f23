"""Facts as triples, and the texts that state them: the common part of WebNLG and DART.

The context of Hu et al.'s code has the triples of an input in the file's order:

    Alan_Bean : occupation : Test_pilot | Alan_Bean : birthPlace : Wheeler,_Texas

Several texts describe one input; `e2e.grouped` collects them, also those of repeated entries.
"""

from collections.abc import Iterable
from typing import NamedTuple

from lora_jax.data.sets.e2e import Record

Triple = tuple[str, str, str]


class Entry(NamedTuple):
  """An input and its texts.

  Attributes:
    triples: subject, relation and object of each fact, at least one.
    texts: each states all the facts.
    category: of the subjects; empty in DART.
  """

  triples: tuple[Triple, ...]
  texts: tuple[str, ...]
  category: str = ""


def context_of(triples: Iterable[Triple]) -> str:
  """Returns the context of an input.

  >>> context_of([("Alan_Bean", "occupation", "Test_pilot"), ("Alan_Bean", "status", "Retired")])
  'Alan_Bean : occupation : Test_pilot | Alan_Bean : status : Retired'
  """
  return " | ".join(" : ".join(triple) for triple in triples)


def records(entries: Iterable[Entry]) -> list[Record]:
  """Returns a record for each text, in the entries' order."""
  return [Record(context_of(entry.triples), text) for entry in entries for text in entry.texts]
