"""Slot errors of E2E texts: which values of an input a text leaves out, changes or adds.

After Dušek et al. (2019, "Semantic Noise Matters for Neural Natural Language Generation",
arXiv 1911.03905): patterns find the wordings of values, and

    slot error rate = (missing + wrong + added) / slots of the inputs.

The patterns are our own. Their rules:

- A missing slot is one whose value no pattern finds; it is wrong if another value of the slot is
  found instead. A slot that the input does not have is added if a value of it is found.
- `name` and `near` are found by their words, with or without "The", with "Cafe" for "Café". Other
  venues of the data set are wrong or added. Venues are removed before any other slot is looked for,
  so that "Rainbow Vegetarian Café" is no coffee shop.
- Prices and ratings have three levels. "cheap" and "less than £ 20" are one level, as are "low" and
  "1 out of 5": people use the words of one for the other.
- "restaurant" is a common noun here. It states the type if the input has that type, and is never
  an error otherwise.
- Families and children are welcome unless their clause has a negation near them.
- A paraphrase without the value, such as "quick food", counts as missing.

Human references have errors by these rules too, and most are real (docs/smollm2.md has counts).
Compare systems with the references' rate.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lora_jax.metrics.bootstrap import percentile_interval

SLOTS = ("name", "Type", "food", "price", "customer rating", "area", "family friendly", "near")
OFFICIAL = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}

VENUES = (
  *("Alimentum", "All Bar One", "Aromi", "Avalon", "Bibimbap House", "Blue Spice"),
  *("Browns Cambridge", "Burger King", "Café Adriatic", "Café Brazil", "Café Rouge"),
  *("Café Sicilia", "Clare Hall", "Clowns", "Cocum", "Cotto", "Crowne Plaza Hotel"),
  *("Express by Holiday Inn", "Fitzbillies", "Giraffe", "Green Man", "Loch Fyne"),
  *("Midsummer House", "Rainbow Vegetarian Café", "Raja Indian Cuisine", "Ranch", "Strada"),
  *("Taste of Cambridge", "The Bakers", "The Cambridge Blue", "The Cricketers"),
  *("The Dumpling Tree", "The Eagle", "The Golden Curry", "The Golden Palace", "The Mill"),
  *("The Olive Grove", "The Phoenix", "The Plough", "The Portland Arms", "The Punter"),
  *("The Rice Boat", "The Six Bells", "The Sorrento", "The Twenty Two", "The Vaults"),
  *("The Waterman", "The Wrestlers", "Travellers Rest Beefeater", "Wildwood"),
  *("Yippee Noodle Bar", "Zizzi"),
)

_FAMILY = r"(?:famil\w+|kids?|child\w*|toddlers?)"
_NOT = r"(?:not|no|non|never|nor|\w+n't|cannot|isnt|doesnt|without|un)"
_IS = r"(?:is|are|of|as|was|being|it|its|at|a|an|the|very|quite|only|rather|range|ranges|in)"
_PRICE = r"pric\w*|cost\w*|range"
_RATING = r"rat(?:ed|es?|ings?)|reviews?|reviewed|customer (?:service|satisfaction|feedback)"
_RATING += r"|satisfaction|feedback"


def _near_noun(level: str, noun: str, other: str) -> str:
  """Returns a pattern of a level that describes a noun and not the other noun."""
  before = rf"\b(?:{level})(?:ly)?[ -]*(?:\w+ )?(?:customer[- ]*)?(?:{noun})\b"
  after = rf"\b(?:{noun})[ :]*(?:{_IS} )*(?:{level})\b(?![ -]*(?:customer )?(?:{other})\b)"
  return f"{before}|{after}"


def _price(level: str, words: str) -> str:
  return rf"\b(?:{words})|{_near_noun(level, _PRICE, _RATING)}"


def _rating(level: str, words: str) -> str:
  return rf"{words}|{_near_noun(level, _RATING, _PRICE)}"


PLAIN = {  # wordings, and simpler ones that the patterns match
  r" (n't|'t)\b": r"\1",
  r" - ": "-",
  r"\b(?:1|one)[ -]*(?:out of|of|out|/)[ -]*(?:a )?(?:5|five)\b": "onestar",
  r"\b(?:3|three)[ -]*(?:out of|of|out|/)[ -]*(?:a )?(?:5|five)\b": "threestar",
  r"\b(?:5|five)[ -]*(?:out of|of|out|/)[ -]*(?:a )?(?:5|five)\b": "fivestar",
  r"\b(?:higher|more|above|over|better)[ -](?:than )?average\b": "high",
  r"\b(?:lower|less|below|under|worse)[ -](?:than )?average\b": "low",
  r"\b(?:outside|outskirts|north|south|east|west|side|edge|near|close|next|far|just off)\b"
  r"(?: (?:of|from|to))*(?: the)? (?:city|town)(?:[ -]cent(?:re|er))?\b": "",
  r"\barea of (?:the )?(?:city|town)\b(?! cent)": "area",
}
PATTERNS: Mapping[str, Mapping[str, str]] = {
  "Type": {
    "pub": r"\bpubs?\b",
    "coffee shop": r"\bcoffee|\bcaf[eé]s?\b",
    "restaurant": r"\brestaurants?\b|\bdiner\b|\beater(?:y|ies)\b",
  },
  "food": {
    "Chinese": r"\bchinese\b",
    "English": r"\benglish\b|\bbritish\b|\bfish and chips\b",
    "Fast food": r"\bfast[- ]*foods?\b|\bburgers?\b",
    "French": r"\bfrench\b",
    "Indian": r"\bindian\b",
    "Italian": r"\bitalian\b|\bpastas?\b|\bpizzas?\b",
    "Japanese": r"\bjapanese\b|\bsushi\b",
  },
  "price": {
    "low": _price(
      "low|lower|small|reasonable|good|great",
      r"cheap\w*|inexpensive|low[- ]cost|affordable|20 (?:pounds )?or less"
      r"|(?:less|under|below|lower|cheaper)(?: than)? (?:£ ?)?20",
    ),
    "moderate": _price(
      "moderate|average|mid|middle|medium|fair|mid[- ]*range|reasonable",
      r"moderate(?:ly)?[ -]*pric\w+|(?:£ ?)?20 ?(?:-|to|and) ?(?:£ ?)?25",
    ),
    "high": _price(
      "high|higher|upper|expensive",
      r"expensive|pric(?:e?y|ier)|costly|upscale|high[- ]*end|30 (?:pounds )?(?:and|or) (?:more|up)"
      r"|(?:more|over|above|greater|higher)(?: than)? (?:£ ?)?30",
    ),
  },
  "customer rating": {
    "low": _rating(
      "low|lower|poor|bad|one|1",
      r"\bonestar|\b(?:1|one)[- ]*stars?|poorly|not (?:well|highly)[ -]*rated",
    ),
    "average": _rating(
      "average|moderate|medium|mediocre|decent|three|3", r"\bthreestar|\b(?:3|three)[- ]*stars?"
    ),
    "high": _rating(
      "high|higher|excellent|great|good|top|well|five|5",
      r"\bfivestar|\b(?:5|five)[- ]*stars?|(?<!not )(?:highly|well|top)[ -]*rat\w+",
    ),
  },
  "area": {
    "city centre": r"\b(?:city|town)\b|\bcent(?:re|er)\b|\bdowntown\b",
    "riverside": r"\briver|\bwaterfront\b|\bwaterside\b|\bthames\b",
  },
}
LEVELS = {
  "price": {
    **{"cheap": "low", "less than £ 20": "low", "moderate": "moderate", "£ 20 - 25": "moderate"},
    **{"high": "high", "more than £ 30": "high"},
  },
  "customer rating": {
    **{"low": "low", "1 out of 5": "low", "average": "average", "3 out of 5": "average"},
    **{"high": "high", "5 out of 5": "high"},
  },
}


class SlotErrors(NamedTuple):
  """The slots of an input that a text gets wrong, by name."""

  missing: tuple[str, ...]
  wrong: tuple[str, ...]
  added: tuple[str, ...]

  @property
  def total(self) -> int:
    return sum(map(len, self))


class SlotScores(NamedTuple):
  """The errors of several texts.

  Attributes:
    counts: for each text, the numbers of missing, wrong and added slots, and of the input's slots.
  """

  counts: Int[np.ndarray, "texts 4"]

  @property
  def rate(self) -> float:
    """The slot error rate, x 100."""
    return float(_rate(self.counts.sum(0)))

  def interval(
    self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
  ) -> tuple[float, float]:
    """Returns the ends of the rate's percentile interval over inputs, as in `bootstrap.py`."""
    size = len(self.counts)
    draws = np.random.default_rng(seed).integers(size, size=(resamples, size))
    return percentile_interval(_rate(self.counts[draws].sum(1)), confidence)


def _rate(counts: Int[np.ndarray, "*batch 4"]) -> Float[np.ndarray, "*batch"]:
  return 100 * counts[..., :3].sum(-1) / counts[..., 3]


def parse_slots(context: str) -> dict[str, str]:
  """Returns the slots of an input in either of the data's formats.

  >>> parse_slots("name : The Vaults | Type : pub")
  {'name': 'The Vaults', 'Type': 'pub'}
  >>> parse_slots("name[The Vaults], priceRange[less than £20]")
  {'name': 'The Vaults', 'price': 'less than £ 20'}

  Raises:
    ValueError: if a slot is unknown or appears twice, or the name is missing.
  """
  slots: dict[str, str] = {}
  is_official = "[" in context
  for part in re.split(r"\]\s*,?" if is_official else r"\|", context):
    if is_official and not part.strip():
      continue
    name, colon, value = (piece.strip() for piece in part.partition("[" if is_official else ":"))
    name = OFFICIAL.get(name, name)
    if name not in SLOTS or name in slots or not colon or not value:
      raise ValueError(
        f"expected 'slot : value | ...' with each of {', '.join(SLOTS)} at most once, got "
        f"{part.strip()!r} in {context!r}"
      )
    value = re.sub(r"£(?=\d)", "£ ", value)
    slots[name] = re.sub(r"(\d)-(\d)", r"\1 - \2", value)
  if "name" not in slots:
    raise ValueError(f"expected a name, got {context!r}")
  return slots


def slot_errors(text: str, slots: Mapping[str, str]) -> SlotErrors:
  """Returns the errors of a text about an input, as `parse_slots` returns it."""
  stated = stated_values(text, [slots[name] for name in ("name", "near") if name in slots])
  missing, wrong, added = [], [], []
  venues = {slots[name] for name in ("name", "near") if name in slots}
  others = stated["venue"] - venues
  for name in ("name", "near"):
    if name in slots and slots[name] not in stated["venue"]:
      (wrong if others else missing).append(name)
      others = set(sorted(others)[1:])
  added += ["near"] * len(others)
  for name in SLOTS:
    if name in ("name", "near"):
      continue
    value = slots.get(name)
    value = LEVELS.get(name, {}).get(value or "", value)
    found = stated[name]
    other = found - {value} - ({"restaurant"} if name == "Type" else set())
    if value is None:
      added += [name] if other else []
    elif value not in found:
      (wrong if other else missing).append(name)
    elif other:
      added.append(name)
  return SlotErrors(tuple(missing), tuple(wrong), tuple(added))


def stated_values(text: str, venues: Iterable[str] = ()) -> dict[str, set[str]]:
  """Returns the values that a text states, by slot; "venue" has its names of places.

  Args:
    text: any text.
    venues: names of places, in addition to those of the data set.
  """
  places = tuple(sorted({*VENUES, *venues}, key=len, reverse=True))
  found: dict[str, set[str]] = {"venue": set()}

  def removed(match: re.Match[str]) -> str:
    found["venue"].add(places[(match.lastindex or 0) - 1])
    return "VENUE"

  text = _any_of(places).sub(removed, text)
  text = re.sub(r"\s+", " ", text.lower())
  for wording, plain in PLAIN.items():
    text = re.sub(wording, plain, text)
  for name, patterns in PATTERNS.items():
    found[name] = {value for value, pattern in patterns.items() if re.search(pattern, text)}
  found["family friendly"] = _families(text)
  return found


def slot_scores(texts: Sequence[str], contexts: Sequence[str]) -> SlotScores:
  """Returns the errors of one text for each input.

  Args:
    texts: the texts.
    contexts: their inputs, as in the data's files.
  Raises:
    ValueError: if their numbers differ or are 0; as in `parse_slots`.
  """
  if len(texts) != len(contexts) or not texts:
    raise ValueError(
      f"got {len(texts)} texts and {len(contexts)} inputs; expected one text for each input"
    )
  parsed = [parse_slots(context) for context in contexts]
  errors = [slot_errors(text, slots) for text, slots in zip(texts, parsed, strict=True)]
  rows = [[*map(len, error), len(slots)] for error, slots in zip(errors, parsed, strict=True)]
  return SlotScores(np.array(rows))


@functools.lru_cache(maxsize=1024)
def _any_of(venues: tuple[str, ...]) -> re.Pattern[str]:
  """Returns a pattern with a group for each venue."""
  return re.compile("|".join(f"({_venue(venue)})" for venue in venues), re.IGNORECASE)


def _venue(venue: str) -> str:
  words = re.escape(venue.removeprefix("The ")).replace("é", "[eé]").replace(r"\ ", r"[ -]+")
  return rf"(?<!\w)(?:the )?{words}(?!\w)"


def _families(text: str) -> set[str]:
  """Returns "yes", "no" or both: "no" if a negation is near a mention of families or children."""
  found = set()
  for clause in re.split(r"[.;]|, (?:but|and)|\bbut\b", text):
    if re.search(r"\badults?\b", clause):
      found.add("no")
    if not re.search(rf"\b{_FAMILY}\b", clause):
      continue
    before = rf"\b{_NOT}(?:[ -]+\w+){{0,6}}?[ -]+{_FAMILY}\b"
    after = rf"\b{_FAMILY}\b(?:[ -]+\w+){{0,3}}[ -]+(?:{_NOT}\b|unfriendly)|{_FAMILY}[ -]unfriendly"
    found.add("no" if re.search(f"{before}|{after}", clause) else "yes")
  return found
