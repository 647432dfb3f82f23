"""How much of a weight lies in an adapter's directions (Hu et al. 2021, sec. 7.3 and Table 7).

With U and V the first directions of inputs and outputs of the delta, of the weight itself, or
random ones:

    ||U^T W V||_F                      the part of W in these directions
    ||delta||_F / ||U^T W V||_F        the amplification factor, for the delta's own directions
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_jax.analysis.subspace import Subspaces
from lora_jax.fields import Count, read_value


class Amplification(NamedTuple):
  """A row of Table 7 for each layer.

  Attributes:
    weight, delta: the Frobenius norms of the weight and of the delta.
    along_delta, along_weight: the norm of the weight in the first directions of the delta, and in
      its own.
    along_random: the same in random directions, the root of the mean square.
    factor: delta / along_delta.
  """

  weight: Float[np.ndarray, " layers"]
  delta: Float[np.ndarray, " layers"]
  along_delta: Float[np.ndarray, " layers"]
  along_weight: Float[np.ndarray, " layers"]
  along_random: Float[np.ndarray, " layers"]

  @property
  def factor(self) -> Float[np.ndarray, " layers"]:
    return self.delta / self.along_delta


def amplification(
  weight: Float[np.ndarray, "layers d_in d_out"],
  adapter: Subspaces,
  num_directions: int | None = None,
) -> Amplification:
  """Returns how much of the weights the adapters amplify.

  Args:
    weight: the base model's, as `adapted_matrices` returns them.
    adapter: of the same layers, as `subspaces` returns them.
    num_directions: the first ones of each; None is the adapter's rank.
  Raises:
    ValueError: if the shapes do not agree, or there are fewer directions.
  """
  rank = adapter.values.shape[-1]
  read_value(Count | None, num_directions, "num_directions")
  count = rank if num_directions is None else num_directions
  if count > rank:
    raise ValueError(f"num_directions={count} must be at most the adapter's rank, {rank}")
  weight = np.asarray(weight, np.float64)
  values = np.linalg.svd(weight, compute_uv=False)[..., :count]
  return Amplification(
    np.linalg.norm(weight, axis=(-2, -1)),
    adapter.norm,
    projected_norm(weight, adapter.inputs[..., :count], adapter.outputs[..., :count]),
    np.linalg.norm(values, axis=-1),
    random_projected_norm(weight, count),
  )


def projected_norm(
  weight: Float[np.ndarray, "*layers d_in d_out"],
  inputs: Float[np.ndarray, "*layers d_in rank"],
  outputs: Float[np.ndarray, "*layers d_out rank"],
) -> Float[np.ndarray, "*layers"]:
  """Returns ||U^T W V||_F of each layer, for directions of inputs U and of outputs V.

  Raises:
    ValueError: if their shapes do not agree.
  """
  weight = np.asarray(weight, np.float64)
  *layers, d_in, d_out = weight.shape
  if (inputs.shape[:-1], outputs.shape[:-1]) != ((*layers, d_in), (*layers, d_out)):
    raise ValueError(
      "expected a weight (*layers, d_in, d_out) with directions (*layers, d_in, rank) and "
      f"(*layers, d_out, rank), got {weight.shape}, {inputs.shape} and {outputs.shape}"
    )
  return np.linalg.norm(inputs.mT @ weight @ outputs, axis=(-2, -1))


def random_projected_norm(
  weight: Float[np.ndarray, "*layers d_in d_out"], rank: int
) -> Float[np.ndarray, "*layers"]:
  """Returns the root of the mean of ||U^T W V||_F^2 over random directions, exactly.

  The mean of U U^T is (rank / d_in) I, and of V V^T (rank / d_out) I, which gives
  rank ||W||_F / sqrt(d_in d_out). The first singular vectors of a Gaussian matrix, which the paper
  takes, are such directions.

  Args:
    weight: of each layer.
    rank: the number of directions, at most d_in and d_out.
  Raises:
    ValueError: if there are not as many directions.
  """
  d_in, d_out = weight.shape[-2:]
  read_value(Count, rank, "rank")
  if rank > min(d_in, d_out):
    raise ValueError(f"rank={rank} must be at most {min(d_in, d_out)} for a weight {d_in}x{d_out}")
  return rank * np.linalg.norm(weight, axis=(-2, -1)) / np.sqrt(d_in * d_out)
