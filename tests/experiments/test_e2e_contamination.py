"""True texts and those under another name are the same tokens after the name, scored alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import e2e_contamination
from experiments.e2e_contamination import Row, choose, common_words, halve, interval, table
from experiments.nlg.user_data import load_text
from lora_jax.data.sets import e2e
from lora_jax.models.zoo import load_causal_lm

from tests.tiny_gguf import write_tiny_smollm2


def test_only_the_name_in_the_first_half_differs():
  groups = e2e.grouped(e2e.read("test", "official"))
  true, swapped = halve(groups)
  assert len(true) > 500
  for text, other in zip(*choose(5), strict=True):
    assert text in true
    assert other in swapped
    assert text.first != other.first
  names = {group.context.split("name[")[1].split("]")[0] for group in groups}
  for text, other in zip(true, swapped, strict=True):
    assert text.second == other.second
    assert text.first != other.first
    assert any(name in other.first for name in names)
  references = {reference.strip() for group in groups for reference in group.references}
  joined = [" ".join(text) for text in true]
  assert sum(text in references for text in joined) > 0.9 * len(
    joined
  )  # but for odd spaces in the middle


def test_common_words():
  assert common_words("a b c d", "a b x d") == 2
  assert common_words("a b", "a b c") == 2
  assert common_words("", "a") == 0


@pytest.mark.long
def test_a_model_is_measured(tmp_path, capsys):
  path = write_tiny_smollm2(tmp_path)
  e2e_contamination.main([f"--model={path}", "--count=4"])
  printed = capsys.readouterr().out
  assert printed.startswith("4 texts of the E2E test set")
  assert "| completed, share | 0.000 | 0.000 | +0.000 (+0.000 to +0.000) |" in printed


def test_losses_are_of_the_second_half(tmp_path):
  model = load_causal_lm(write_tiny_smollm2(tmp_path))
  text = load_text(model, chats=False)
  halves, _ = halve(e2e.grouped(e2e.read("test", "official"))[:3])
  measured = e2e_contamination.losses(model, text, halves)  # padded to the longest
  shortest = min(range(len(halves)), key=lambda i: len(" ".join(halves[i])))
  part = halves[shortest]
  first, second = (text.tokenizer.encode(x).ids for x in (part.first, f" {part.second}"))
  logits = model.call(model.params, jnp.asarray([first + second]))[0]
  wanted = jax.nn.log_softmax(logits)[len(first) - 1 : -1]
  expected = -np.mean([row[token] for row, token in zip(wanted, second, strict=True)])
  np.testing.assert_allclose(measured[shortest], expected, rtol=1e-5)


def test_the_difference_has_an_interval():
  true = np.array([1.0, 2.0, 3.0, 4.0])
  low, high = interval(true)
  assert 1.0 <= low < true.mean() < high <= 4.0
  assert "| loss | 2.500 | 3.500 | -1.000 (-1.000 to -1.000) |" in table(
    [Row("loss", true, true + 1)]
  )


@pytest.mark.parametrize("count", ["1", "601"])
def test_a_count_beyond_the_test_set_is_refused(count):
  with pytest.raises(SystemExit, match=r"--count must be an integer in \[2, 600\], got"):
    e2e_contamination.main(["--model=none", f"--count={count}"])
