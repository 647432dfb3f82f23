"""Names of the values that the zoo's models mark, for methods that change activations.

    x = checkpoint_name(x, MLP_OUTPUT)        (jax.ad_checkpoint; the identity)

A mark is visible in the jaxpr and absent from the compiled program. Bottleneck adapters and trained
prefixes replace the marked values (`transform/marks.py`), so that no model knows of any method. A
model of your own needs the marks of the methods that it is to be adapted by.
"""

ATTENTION_OUTPUT = "lora_jax/attention_output"
MLP_OUTPUT = "lora_jax/mlp_output"
LAYER_OUTPUT = "lora_jax/layer_output"
LAYER_INPUT = "lora_jax/layer_input"
TOKENS = "lora_jax/tokens"
TOKEN_EMBEDDINGS = "lora_jax/token_embeddings"
HEAD_INPUT = "lora_jax/head_input"

CHUNKED_SUM = "lora_jax/chunked_sum"
FLOAT32_DOT = "lora_jax/float32_dot"
"""The names of functions with a custom derivative: that of the body, computed earlier
(`training/chunks.py`) or in the inputs' dtype (`models/parts/causal_lm.py`). If a weight in the
body is adapted, the transform emits the body, with its usual derivative, instead."""

PLACES = {
  ATTENTION_OUTPUT: "the attention's output, after dropout and before it is added to its input",
  MLP_OUTPUT: "the MLP's output, after dropout and before it is added to its input",
  LAYER_OUTPUT: "the output of each layer, the hidden states that the next one gets",
  LAYER_INPUT: "the input of each layer, as large as the tokens",
  TOKENS: "the ids of the tokens whose embeddings are looked up",
  TOKEN_EMBEDDINGS: "the embeddings of the tokens, before positions are added or a norm is applied",
  HEAD_INPUT: "the hidden states from which a language model's head computes logits",
}
"""Where a model has each mark. A sublayer's is where Houlsby et al. 2019 (arXiv 1902.00751) insert
an adapter: in their code after the dropout of BERT's sublayers."""
