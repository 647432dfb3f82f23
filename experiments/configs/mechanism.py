"""Why LoRA's variants differ: the sizes of `python -m experiments.mechanism`.

docs/mechanism.md says what is measured. The arms, their ranks and their learning rates are those of
the comparison (configs/variants.py), on the embedded base model.
"""

import dataclasses

from experiments.configs import variants

SEED = 1  # of the adapters, the order of the examples, the codes and Lanczos' first vector
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)  # |cosines| below which a singular vector is an intruder
MAIN_THRESHOLD = 0.5  # the table's; the others show how much depends on it
NUM_VECTORS = 10  # singular vectors of each weight, of the largest singular values


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of the measurements.

  Attributes:
    comparison: of the comparison, for the examples.
    num_batches: training batches over which the Hessian's loss is a mean.
    num_steps: updates, at the default learning rate, before the Hessian is measured again.
    max_products: Hessian-vector products of one eigenvalue.
    tolerance: of its residual, relative to the eigenvalue.
    code_target, code_rank: the weights that memorize codes, and LoRA's rank; other arms have as
      many trained parameters, if their rank is free. Few, so that few pairs fill them.
    pairs: how many keys with a code are memorized, as far as the bits grow with them.
    growth: the bits have stopped growing if the next number of pairs has not this many times more.
    code_batch, code_epochs: pairs in a batch; how often each is seen.
  """

  comparison: variants.Sizes = variants.FULL
  num_batches: int = 2
  num_steps: int = 10
  max_products: int = 30
  tolerance: float = 0.01
  code_target: str = variants.ONE_PROJECTION
  code_rank: int = 1
  pairs: tuple[int, ...] = (32, 64, 128, 256)
  growth: float = 1.1
  code_batch: int = 8
  code_epochs: int = 300


FULL = Sizes()
TINY = Sizes(  # minutes, to see all parts work; its results say nothing
  comparison=variants.TINY,
  num_batches=1,
  num_steps=3,  # the first has a learning rate of 0
  max_products=3,
  pairs=(4,),
  code_batch=4,
  code_epochs=2,
)
