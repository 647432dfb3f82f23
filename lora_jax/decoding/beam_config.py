"""Whose rules a beam search follows.

Scoring, s the sum of a hypothesis's log-probabilities, n its tokens (the end token counts, the
prompt doesn't), score = s / n ** length_penalty:

`transformers`: as its `generate(num_beams=W, early_stopping=False)`. The best max(2, 1 + E) W
  candidates of a step are considered, E the number of end tokens. Those among the best W that
  end become finished, the best W that don't go on. No n-gram of prompt and generated tokens
  comes twice; the ban leaves the other tokens' probabilities as they are. An input is done when
  W hypotheses are finished and s / n ** length_penalty of its best running beam, at the present
  n, is no better than the worst of them: a heuristic where the penalty is positive.
`reference`: as microsoft/LoRA decodes for the paper's tables. The best W candidates of a step
  are considered; one that ends is finished, keeps its score, and leaves its place to others in
  the next step. No n-gram of the generated tokens alone comes twice; a banned token's
  probability goes to the others. The reference always runs `max_new_tokens` steps; here an
  input is done once no running beam could still win, which changes nothing: s only falls, and
  the largest possible n bounds the score.

In both, what runs at `max_new_tokens` is finished there. Of equal scores the one of the lower
beam, then of the lower token id, comes first.
"""

import dataclasses
from typing import Literal, get_args

Scoring = Literal["transformers", "reference"]


@dataclasses.dataclass(frozen=True)
class BeamConfig:
  """How to search; the defaults are the paper's for E2E (Table 11), but for `eos_ids`.

  Attributes:
    eos_ids: tokens that end a hypothesis.
    num_beams: W, at least 1.
    length_penalty: the power of the length that a score is divided by; larger favours longer.
    no_repeat_ngram_size: n-grams of this size come once only; 0 for no such rule.
    max_new_tokens: at most so many generated tokens, the end token included.
    pad_id: fills the output after a hypothesis.
    num_return: hypotheses returned for each input, at most W.
    scoring: whose rules; see above.
  """

  eos_ids: tuple[int, ...]
  num_beams: int = 10
  length_penalty: float = 0.9
  no_repeat_ngram_size: int = 4
  max_new_tokens: int = 64
  pad_id: int = 0
  num_return: int = 1
  scoring: Scoring = "transformers"

  def __post_init__(self):
    object.__setattr__(self, "eos_ids", tuple(int(token) for token in self.eos_ids))
    for name, least in (("num_beams", 1), ("no_repeat_ngram_size", 0), ("max_new_tokens", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
    if not 1 <= self.num_return <= self.num_beams:
      raise ValueError(f"num_return must be 1 to {self.num_beams} beams, got {self.num_return}")
    if self.scoring not in get_args(Scoring):
      raise ValueError(
        f"scoring must be one of {', '.join(get_args(Scoring))}, got {self.scoring!r}"
      )

  @property
  def num_candidates(self) -> int:
    """K, the continuations of an input that a step considers."""
    if self.scoring == "reference":
      return self.num_beams
    return max(2, 1 + len(self.eos_ids)) * self.num_beams
