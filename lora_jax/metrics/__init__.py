"""Metrics of generated text, as the paper's evaluation scripts define them.

| metric  | what it is                                     | where its definition comes from      |
|---------|------------------------------------------------|--------------------------------------|
| BLEU    | precision of 1- to 4-grams, brevity penalty    | Papineni et al. 2002; sacrebleu:     |
|         |                                                | lowercase, 13a tokens, not smoothed  |
| NIST    | 1- to 5-grams weighted by their information    | Doddington 2002; mteval-v13a as the  |
|         |                                                | E2E scripts' Python port has it      |
| METEOR  | aligned words, stems, synonyms and paraphrases | Denkowski and Lavie 2014; METEOR     |
|         |                                                | 1.5's jar, with `-l en -norm`        |
| ROUGE-L | longest common subsequence, F with beta 1.2    | Lin 2004; pycocoevalcap              |
| CIDEr   | cosine of tf-idf n-grams, with a penalty for   | Vedantam et al. 2015, as CIDEr-D;    |
|         | another length                                 | pycocoevalcap                        |

The last three are defined after the Penn Treebank tokenizer, a Java program, without punctuation.
Where Java or a package is missing, their cells are None and `NlgScores.missing` says why.
`slots.py` counts the slot errors of E2E texts. `rouge.py` has the ROUGE-1, ROUGE-2 and ROUGE-L of
summaries, another definition than the table's; `exact.py` the share of exact answers. `ter.py` has
the translation edit rate, and `data_to_text.py` the scores of WebNLG and DART.

Two modules measure weights instead of texts: `curvature.py` the largest eigenvalue of a loss's
Hessian, `spectra.py` the singular vectors that training changes. They are imported by their names.
"""

from lora_jax.metrics.bootstrap import Difference as Difference
from lora_jax.metrics.bootstrap import Interval as Interval
from lora_jax.metrics.bootstrap import bootstrap as bootstrap
from lora_jax.metrics.bootstrap import differences as differences
from lora_jax.metrics.bootstrap import intervals as intervals
from lora_jax.metrics.bootstrap import paired_bootstrap as paired_bootstrap
from lora_jax.metrics.exact import exact_match as exact_match
from lora_jax.metrics.exact import part_accuracy as part_accuracy
from lora_jax.metrics.nlg import Measured as Measured
from lora_jax.metrics.nlg import NlgScores as NlgScores
from lora_jax.metrics.nlg import measure as measure
from lora_jax.metrics.nlg import score as score
from lora_jax.metrics.rouge import rouge as rouge
from lora_jax.metrics.slots import SlotScores as SlotScores
from lora_jax.metrics.slots import slot_scores as slot_scores
