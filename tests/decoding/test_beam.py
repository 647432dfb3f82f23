"""Beam search agrees with `transformers`, and with a plain search by the reference's rules."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lora_jax.decoding import BeamConfig, CachedModel, beam, beam_search, from_linen
from lora_jax.decoding.beam import sizes
from lora_jax.decoding.cached_model import take_slots
from lora_jax.models.gpt2.folder import load_gpt2
from lora_jax.models.gpt2.model import GPT2, init_cache

from tests import make_beam_golden
from tests.paths import GOLDEN as GOLDEN_FOLDER

FOLDER = GOLDEN_FOLDER / "beam"
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
EOS_IDS = tuple(GOLDEN["eos_ids"])
TIE = 1e-5
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def gpt2():
  return load_gpt2(FOLDER)


@pytest.fixture(scope="module")
def model(gpt2):
  config, _ = gpt2
  return from_linen(GPT2(config), functools.partial(init_cache, config), config.num_positions)


@pytest.fixture(scope="module")
def log_probs(gpt2):
  """Returns a function from a row of tokens to the log-probabilities after each."""
  config, params = gpt2
  net = GPT2(config)
  forward = jax.jit(lambda tokens: jax.nn.log_softmax(net.apply({"params": params}, tokens)))

  def log_probs_of(tokens):
    row = np.zeros((1, config.num_positions), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(forward(row))[0, : len(tokens)]

  return log_probs_of


def score_of(log_probs, prompt, tokens, length_penalty):
  table = log_probs([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
  return sum(float(row[token]) for row, token in zip(table, tokens, strict=True)) / (
    len(tokens) ** length_penalty
  )


def check_equal(log_probs, actual, prompts, expected, length_penalty):
  """Checks the best hypotheses against the expected (tokens, score); ties have equal scores."""
  for i, (prompt, (tokens, score)) in enumerate(zip(prompts, expected, strict=True)):
    chosen_tokens = actual.tokens[i, 0, : actual.lengths[i, 0]].tolist()
    assert actual.scores[i, 0] == pytest.approx(score, abs=TIE * max(1, abs(score))), i
    if chosen_tokens != tokens:
      expected_score = score_of(log_probs, prompt, tokens, length_penalty)
      assert expected_score == pytest.approx(float(actual.scores[i, 0]), abs=TIE), f"{i}: no tie"


def settings_id(case):
  return "-".join(str(value) for value in case["settings"].values())


BEAM_CASES = [case for case in GOLDEN["cases"] if case["settings"]["num_beams"] > 1]
BEAM_CASES[1] = pytest.param(BEAM_CASES[1], marks=LONG)  # the first with another length penalty


@pytest.mark.parametrize("case", BEAM_CASES, ids=settings_id)
def test_it_finds_what_transformers_found(model, gpt2, log_probs, case):
  config = BeamConfig(eos_ids=EOS_IDS, **case["settings"])
  prompts = GOLDEN["prompts"][:24]
  actual = beam_search(model, gpt2[1], prompts, config, batch_size=8)
  expected = list(zip(case["tokens"], case["scores"], strict=True))[:24]
  check_equal(log_probs, actual, prompts, expected, config.length_penalty)
  assert len(set(actual.lengths[:, 0])) > 1 or config.max_new_tokens < 8  # they end anywhere


@pytest.mark.long
def test_it_finds_what_transformers_found_for_200_prompts(model, gpt2, log_probs):
  case = GOLDEN["cases"][0]
  config = BeamConfig(eos_ids=EOS_IDS, **case["settings"])
  prompts = GOLDEN["prompts"]
  actual = beam_search(model, gpt2[1], prompts, config)
  expected = list(zip(case["tokens"], case["scores"], strict=True))
  check_equal(log_probs, actual, prompts, expected, config.length_penalty)


def test_it_finds_what_transformers_finds_now(model, gpt2, log_probs):
  pytest.importorskip("transformers", reason="the peer is not installed (extra `peers`)")
  torch = pytest.importorskip("torch", reason="the peer is not installed (extra `peers`)")
  from transformers import GPT2LMHeadModel

  torch.set_num_threads(1)
  settings = make_beam_golden.SETTINGS[1]
  prompts = GOLDEN["prompts"][24:48]
  expected = make_beam_golden.search(GPT2LMHeadModel.from_pretrained(FOLDER), prompts, **settings)
  config = BeamConfig(eos_ids=EOS_IDS, **settings)
  actual = beam_search(model, gpt2[1], prompts, config)
  check_equal(log_probs, actual, prompts, expected, config.length_penalty)


# ---- the reference's rules, written plainly -----------------------------------------------


def reference_search(log_probs, prompt, config):
  """Returns the best (tokens, score), reading every hypothesis again at each of all steps."""
  beams, best = [([], 0.0)], ([], -np.inf)
  size = config.no_repeat_ngram_size
  for _ in range(config.max_new_tokens):
    candidates = []
    for tokens, total in beams:
      row = log_probs([*prompt, *tokens])[-1].astype(np.float64)
      ngrams = [tokens[i : i + size] for i in range(len(tokens) - size + 1)]
      for ngram in ngrams:
        if size and ngram[:-1] == tokens[len(tokens) - size + 1 :]:
          row[ngram[-1]] = -np.inf
      row -= np.log(np.exp(row).sum())
      candidates += [(total + row[token], [*tokens, token]) for token in range(len(row))]
    candidates.sort(key=lambda candidate: -candidate[0])
    beams = []
    for total, tokens in candidates[: config.num_beams]:
      if tokens[-1] in config.eos_ids:
        best = max(best, (tokens, total / len(tokens) ** config.length_penalty), key=lambda b: b[1])
      else:
        beams.append((tokens, total))
    if not beams:
      return best
  final = [(tokens, total / len(tokens) ** config.length_penalty) for tokens, total in beams]
  return max([best, *final], key=lambda b: b[1])


@pytest.mark.parametrize(
  ("penalty", "size"),
  [(0.8, 2), *(pytest.param(*pair, marks=LONG) for pair in [(-0.7, 3), (1.5, 1)])],
)
def test_the_reference_rules_are_those_of_a_plain_search(model, gpt2, log_probs, penalty, size):
  config = BeamConfig(
    eos_ids=EOS_IDS,
    num_beams=4,
    length_penalty=penalty,
    no_repeat_ngram_size=size,
    max_new_tokens=16,
    scoring="reference",
  )
  prompts = GOLDEN["prompts"][:10]
  actual = beam_search(model, gpt2[1], prompts, config)
  expected = [reference_search(log_probs, prompt, config) for prompt in prompts]
  check_equal(log_probs, actual, prompts, expected, penalty)


# ---- any scoring -------------------------------------------------------------------------


CONFIG = BeamConfig(eos_ids=EOS_IDS, num_beams=4, max_new_tokens=12, num_return=4)


@pytest.mark.parametrize("scoring", ["transformers", pytest.param("reference", marks=LONG)])
def test_batches_and_padding_change_nothing(model, gpt2, scoring):
  config = BeamConfig(
    eos_ids=EOS_IDS, num_beams=4, max_new_tokens=12, num_return=4, scoring=scoring
  )
  prompts = GOLDEN["prompts"][:9]
  whole = beam_search(model, gpt2[1], prompts, config)
  parts = beam_search(model, gpt2[1], prompts, config, batch_size=4, length_multiple=24)
  np.testing.assert_array_equal(whole.tokens[:, 0], parts.tokens[:, 0])
  np.testing.assert_allclose(whole.scores, parts.scores, atol=1e-5)
  assert (np.diff(whole.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=LONG), True])
def test_slots_of_dead_beams_may_be_dropped(gpt2, monkeypatch, scan_layers):
  """A search whose cache holds all slots to the end drops none of them."""
  config, params = load_gpt2(FOLDER, scan_layers=scan_layers)
  search = BeamConfig(EOS_IDS, num_beams=4, max_new_tokens=40, num_return=4, length_penalty=2.0)
  prompts, actual, rounds = [prompt[:20] for prompt in GOLDEN["prompts"][:6]], [], []
  take = beam.take_slots
  monkeypatch.setattr(beam, "SLOT_MULTIPLE", 1)
  monkeypatch.setattr(
    beam, "take_slots", lambda *args: jax.debug.callback(lambda: rounds.append(1)) or take(*args)
  )
  for few in (True, False):
    if not few:
      monkeypatch.setattr(beam, "sizes", lambda *args: sizes(*args)[-1:])
    rounds.clear()
    model = from_linen(GPT2(config), functools.partial(init_cache, config), config.num_positions)
    actual.append(beam_search(model, params, prompts, search))
    jax.effects_barrier()
    assert len(rounds) > 3 if few else len(rounds) == 1
  assert actual[0].steps.max() > 20
  np.testing.assert_array_equal(actual[0].tokens, actual[1].tokens)
  np.testing.assert_allclose(actual[0].scores, actual[1].scores, atol=1e-5)


def test_the_output_is_padded_and_knows_its_ends(model, gpt2):
  config = BeamConfig(eos_ids=EOS_IDS, num_beams=4, max_new_tokens=24, pad_id=159)
  actual = beam_search(model, gpt2[1], GOLDEN["prompts"][:24], config)
  assert 0 < actual.ended.sum() < actual.ended.size
  for tokens, length, ended, best in zip(
    actual.tokens[:, 0], actual.lengths[:, 0], actual.ended[:, 0], actual.best(), strict=True
  ):
    assert (tokens[length:] == 159).all()
    assert (tokens[length - 1] in EOS_IDS) == ended
    assert not set(tokens[: length - 1].tolist()) & set(EOS_IDS)
    assert best == tokens[: length - ended].tolist()


def test_eight_devices_find_what_one_does(model, gpt2):
  prompts = GOLDEN["prompts"][:13]
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
  unsharded = beam_search(model, gpt2[1], prompts, CONFIG, batch_size=16)
  params = jax.device_put(gpt2[1], jax.NamedSharding(mesh, jax.P()))
  eight = beam_search(model, params, prompts, CONFIG, batch_size=16, mesh=mesh)
  np.testing.assert_array_equal(unsharded.tokens, eight.tokens)
  np.testing.assert_allclose(unsharded.scores, eight.scores, atol=1e-5)


def test_batches_run_in_threads_only_if_a_program_has_one_device(gpt2, monkeypatch):
  monkeypatch.setattr(beam.os, "cpu_count", lambda: 3)
  assert beam.num_threads(gpt2[1]) == 3
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharded = gpt2[1] | {"wte": jax.device_put(gpt2[1]["wte"], jax.NamedSharding(mesh, jax.P()))}
  assert beam.num_threads(sharded) == 1


def test_a_cache_without_slots_is_refused(model, gpt2):
  broken = dataclasses.replace(model, make_cache=lambda batch_size, num_slots: jnp.zeros((2,)))
  with pytest.raises(ValueError, match="one axis of the inputs and one of the slots"):
    take_slots(broken, jnp.zeros((2,)), jnp.zeros((1, 1), jnp.int32))


def test_equal_scores_go_by_beam_then_token():
  """In a model that gives all tokens the same probability."""
  flat = CachedModel(
    extend=lambda params, tokens, positions, cache, index, mask: (tokens[..., None] * 0.0, cache),
    logits=lambda params, hidden: jnp.broadcast_to(hidden, (*hidden.shape[:-1], 9)),
    make_cache=lambda batch_size, num_slots: jnp.zeros((batch_size, num_slots)),
    max_positions=99,
  )
  config = BeamConfig((8,), num_beams=3, max_new_tokens=3, num_return=3, no_repeat_ngram_size=0)
  actual = beam_search(flat, {}, [[1]], config)
  np.testing.assert_array_equal(actual.tokens[0], [[0, 0, 0], [0, 0, 1], [0, 0, 2]])


def test_too_small_a_vocabulary_is_refused(model, gpt2):
  config = BeamConfig(EOS_IDS, num_beams=100, max_new_tokens=2)
  with pytest.raises(ValueError, match="at least 300 tokens, got 160"):
    beam_search(model, gpt2[1], [[1]], config)
