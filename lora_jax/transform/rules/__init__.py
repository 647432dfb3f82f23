"""One rule per primitive: how an operation passes through a factored weight.

A rule is `rule(call, *operands, **params)`: `call` is the primitive itself, for the base; the
operands are arrays and `Factored` values; the params are the primitive's.

- A *structural* rule returns a `Factored`: the operation moved, cut or scaled the weight.
- A *consumer* returns an array: the operation used the weight on an input. It gets the terms
  to add from `Factored.consume` (or `Factored.dot`), which applies the gain.

A rule raises `Unsupported` with the reason if it cannot. Nothing here depends on jaxprs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.transform.rules import consumers, gather, joining, moving, scaling

Rule = Callable[..., Any]

STRUCTURAL: Mapping[str, Rule] = {
  "transpose": moving.transpose,
  "broadcast_in_dim": moving.broadcast_in_dim,
  "squeeze": moving.squeeze,
  "reshape": moving.reshape,
  "slice": moving.slice_,
  "dynamic_slice": moving.dynamic_slice,
  "split": joining.split,
  "rev": moving.rev,
  "pad": joining.pad,
  "concatenate": joining.concatenate,
  "stack": joining.stack,
  "unstack": joining.unstack,
  "gather": gather.gather,
  "mul": scaling.mul,
  "div": scaling.div,
  "neg": scaling.neg,
  "convert_element_type": moving.convert_element_type,
  "stop_gradient": moving.each_array,
  "pvary": moving.each_array,
  "pcast": moving.each_array,
  "copy": moving.unchanged,
  "copy_p": moving.unchanged,
  "name": moving.unchanged,
  "optimization_barrier": moving.optimization_barrier,
  "sharding_constraint": moving.sharding_constraint,
  "reshard": moving.reshard,
  "all_gather": moving.all_gather,
}

CONSUMERS: Mapping[str, Rule] = {
  "dot_general": consumers.dot_general,
  "ragged_dot_general": consumers.ragged_dot_general,
  "conv_general_dilated": consumers.conv_general_dilated,
}
