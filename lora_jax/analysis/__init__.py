"""Analyses of trained adapters: their subspaces, and how much of the weight they amplify.

Hu et al. 2021 (arXiv 2106.09685), section 7 and appendix H: Figures 3, 4, 6, 7, 8 and Table 7.
`notebooks/subspaces.ipynb` goes through them step by step. Everything is NumPy in float64: factors
are small, and their last singular values are far below float32's resolution of the first ones.
"""

from lora_jax.analysis.amplification import Amplification as Amplification
from lora_jax.analysis.amplification import amplification as amplification
from lora_jax.analysis.amplification import projected_norm as projected_norm
from lora_jax.analysis.amplification import random_projected_norm as random_projected_norm
from lora_jax.analysis.subspace import Subspaces as Subspaces
from lora_jax.analysis.subspace import adapted_matrices as adapted_matrices
from lora_jax.analysis.subspace import directions as directions
from lora_jax.analysis.subspace import random_similarity as random_similarity
from lora_jax.analysis.subspace import random_similarity_deviation as random_similarity_deviation
from lora_jax.analysis.subspace import similarity as similarity
from lora_jax.analysis.subspace import subspaces as subspaces
