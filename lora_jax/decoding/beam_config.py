"""The settings of beam search, with the scoring rules of `transformers` or of the paper's code.

Scoring, s the sum of a hypothesis's log-probabilities, n its tokens (the end token counts, the
prompt doesn't), score = s / n ** length_penalty:

`transformers`: as its `generate(num_beams=W, early_stopping=False)`. The best max(2, 1 + E) W
  candidates of a step are considered, E the number of end tokens. Those among the best W that
  end become finished; the best W that don't end continue. No n-gram of prompt and generated tokens
  occurs twice; the ban leaves the other tokens' probabilities unchanged. An input is done when
  W hypotheses are finished and s / n ** length_penalty of its best running beam, at the present
  n, is no better than the worst of them: a heuristic where the penalty is positive.
`reference`: as microsoft/LoRA decodes for the paper's tables. The best W candidates of a step
  are considered; one that ends is finished, keeps its score, and leaves its place to others in
  the next step. No n-gram of only the generated tokens occurs twice; a banned token's
  probability goes to the others. The reference always runs `max_new_tokens` steps; here an
  input is done once no running beam could still win, with the same result: s only falls, and
  the largest possible n bounds the score.

In both, beams that run at `max_new_tokens` are finished there. Among equal scores, the lower beam
comes first, then the lower token id.
"""

import dataclasses
import operator
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from lora_jax.fields import Within, check_fields

Scoring = Literal["transformers", "reference"]
NumBeams = Annotated[int, Within("[1, 1_024]")]
NewTokens = Annotated[int, Within("[1, 65_536]")]
TokenId = Annotated[int, Within("[0, 2_147_483_647]")]  # int32


@dataclasses.dataclass(frozen=True)
class BeamConfig:
  """How to search; the defaults are the paper's for E2E (Table 11), but for `eos_ids`.

  Attributes:
    eos_ids: tokens that end a hypothesis.
    num_beams: W, the number of beams.
    length_penalty: the power of the length by which a score is divided; larger favors longer.
    no_repeat_ngram_size: n-grams of this size occur only once; 0 for no such rule.
    max_new_tokens: the most generated tokens, the end token included.
    pad_id: fills the output after a hypothesis.
    num_return: hypotheses returned for each input, at most W.
    scoring: the scoring rules, as above.

  Raises:
    ValueError: naming a field that has another type or is out of bounds.
  """

  eos_ids: tuple[TokenId, ...]
  num_beams: NumBeams = 10
  length_penalty: Annotated[float, Within("[-100, 100]")] = 0.9
  no_repeat_ngram_size: Annotated[int, Within("[0, 65_536]")] = 4
  max_new_tokens: NewTokens = 64
  pad_id: TokenId = 0
  num_return: NumBeams = 1
  scoring: Scoring = "transformers"

  def __post_init__(self):
    object.__setattr__(self, "eos_ids", as_token_ids(self.eos_ids))
    check_fields(self)
    if self.num_return > self.num_beams:
      raise ValueError(
        f"num_return must be at most num_beams = {self.num_beams}, got {self.num_return}"
      )

  @property
  def num_candidates(self) -> int:
    """K, the number of continuations of an input that a step considers."""
    if self.scoring == "reference":
      return self.num_beams
    return max(2, 1 + len(self.eos_ids)) * self.num_beams


def as_token_ids(values: Iterable[Any]) -> tuple[int, ...]:
  """Returns end tokens as a tuple, NumPy's integers included.

  Raises:
    ValueError: if they are not a sequence of integers.
  """
  try:
    ids = tuple(values)
    if isinstance(values, str) or any(isinstance(value, bool) for value in ids):
      raise TypeError
    return tuple(operator.index(value) for value in ids)
  except TypeError:
    raise ValueError(f"eos_ids must be a sequence of token ids, got {repr(values)[:100]}") from None
