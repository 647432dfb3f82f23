"""Settings and prompts of beam search and sampling that must be refused."""

import jax
import jax.numpy as jnp

from lora_jax import LoraConfig
from lora_jax.arithmetic import Bank
from lora_jax.decoding import BeamConfig, CachedModel, SamplingConfig, beam_search, generate

from tests.bad_inputs import BadInput

NAN, INF = float("nan"), float("inf")


def _never(*_):
  raise AssertionError("is refused before the model is called")


MODEL = CachedModel(_never, _never, _never, max_positions=16)


def beam(name, words, eos_ids=(0,), **settings):
  return BadInput(f"beam: {name}", lambda _: BeamConfig(eos_ids, **settings), words)


def sampling(name, words, eos_ids=(0,), **settings):
  return BadInput(f"sampling: {name}", lambda _: SamplingConfig(eos_ids, **settings), words)


def search(name, words, prompts=((1, 2),), max_new_tokens=8, **options):
  """Returns the row of a beam search."""
  config = BeamConfig((0,), num_beams=2, max_new_tokens=max_new_tokens)
  return BadInput(
    f"search: {name}", lambda _: beam_search(MODEL, {}, prompts, config, **options), words
  )


def sample(name, words, prompts=((1, 2),), temperature=0.0, max_new_tokens=8, **options):
  """Returns the row of greedy decoding or sampling."""
  config = SamplingConfig((0,), temperature, max_new_tokens=max_new_tokens)
  return BadInput(
    f"generate: {name}", lambda _: generate(MODEL, {}, prompts, config, **options), words
  )


def banked(name, words, bank_slots):
  """Returns the row of greedy decoding with a bank of two slots."""
  bank = Bank(LoraConfig(1, 1.0, "w"), {"w": jnp.zeros((2, 4))})
  config = SamplingConfig((0,), temperature=0.0, max_new_tokens=8)
  params = {"base": {}, "bank": bank}
  return BadInput(
    f"bank: {name}",
    lambda _: generate(MODEL, params, ((1, 2),), config, bank_slots=bank_slots),
    words,
  )


ROWS = [
  beam("no beams", ("num_beams must be an integer in [1", "got 0"), num_beams=0),
  beam("-2 beams", ("num_beams", "got -2"), num_beams=-2),
  beam("2.5 beams", ("num_beams must be an integer", "got 2.5"), num_beams=2.5),
  beam("true as beams", ("num_beams", "got True"), num_beams=True),
  beam("beams as text", ("num_beams", "'4'"), num_beams="4"),
  beam("10^9 beams", ("num_beams", "1_024", "got 1000000000"), num_beams=10**9),
  beam("penalty NaN", ("length_penalty must be a finite number", "nan"), length_penalty=NAN),
  beam("penalty infinite", ("length_penalty", "inf"), length_penalty=INF),
  beam("penalty 1e9", ("length_penalty", "[-100, 100]"), length_penalty=1e9),
  beam("penalty as text", ("length_penalty", "'long'"), length_penalty="long"),
  beam("n-grams of -1", ("no_repeat_ngram_size", "got -1"), no_repeat_ngram_size=-1),
  beam("n-grams of 10^9", ("no_repeat_ngram_size", "1000000000"), no_repeat_ngram_size=10**9),
  beam("n-grams of 1.5", ("no_repeat_ngram_size", "1.5"), no_repeat_ngram_size=1.5),
  beam("no new tokens", ("max_new_tokens", "got 0"), max_new_tokens=0),
  beam("10^7 new tokens", ("max_new_tokens", "65_536", "10000000"), max_new_tokens=10**7),
  beam("no hypotheses", ("num_return", "got 0"), num_return=0),
  beam("more than the beams", ("num_return", "num_beams = 2", "got 3"), num_beams=2, num_return=3),
  beam("an unknown scoring", ("scoring must be one of", "'fair'"), scoring="fair"),
  beam("no scoring", ("scoring must be one of", "None"), scoring=None),
  beam("padding of -1", ("pad_id", "got -1"), pad_id=-1),
  beam("an end token of -1", ("eos_ids[1]", "got -1"), eos_ids=(0, -1)),
  beam("an end token of 2.5", ("eos_ids", "2.5"), eos_ids=(2.5,)),
  beam("end tokens as text", ("eos_ids", "'<eos>'"), eos_ids="<eos>"),
  beam("an end token alone", ("eos_ids must be a sequence", "got 0"), eos_ids=0),
  beam("true as an end token", ("eos_ids", "True"), eos_ids=(True,)),
  sampling("temperature -1", ("temperature", "[0, 1_000]", "got -1"), temperature=-1.0),
  sampling("temperature NaN", ("temperature", "finite", "nan"), temperature=NAN),
  sampling("temperature infinite", ("temperature", "inf"), temperature=INF),
  sampling("temperature 1e-38", ("temperature", ">= 1e-6", "got 1e-38"), temperature=1e-38),
  sampling("temperature as text", ("temperature", "'hot'"), temperature="hot"),
  sampling("temperature null", ("temperature", "None"), temperature=None),
  sampling("top_p 0", ("top_p", "(0, 1]", "got 0"), top_p=0.0),
  sampling("top_p 1.5", ("top_p", "(0, 1]", "1.5"), top_p=1.5),
  sampling("top_p -0.1", ("top_p", "-0.1"), top_p=-0.1),
  sampling("top_p NaN", ("top_p", "nan"), top_p=NAN),
  sampling("top_p as a percentage", ("top_p", "got 95"), top_p=95),
  sampling("no new tokens", ("max_new_tokens", "got 0"), max_new_tokens=0),
  sampling("10^7 new tokens", ("max_new_tokens", "10000000"), max_new_tokens=10**7),
  sampling("new tokens as a float", ("max_new_tokens", "8.0"), max_new_tokens=8.0),
  sampling("padding of -1", ("pad_id", "got -1"), pad_id=-1),
  sampling("end tokens null", ("eos_ids", "None"), eos_ids=None),
  sampling("an end token of 2^40", ("eos_ids[0]", str(2**40)), eos_ids=(2**40,)),
  search("more new tokens than positions", ("max_new_tokens", "16", "got 17"), max_new_tokens=17),
  search("an empty prompt", ("prompt 1", "is empty"), ((1,), ())),
  search("a long prompt", ("prompt 0", "exceeds 9"), (range(10),)),
  search("batch size 0", ("batch_size", "got 0"), batch_size=0),
  search("batch size 1.5", ("batch_size", "1.5"), batch_size=1.5),
  search("a multiple of 0", ("length_multiple", "got 0"), length_multiple=0),
  sample("a text as a prompt", ("prompt 0", "token ids", "'Hi'"), ["Hi"]),
  sample("a float as a token", ("prompt 0", "token ids"), [[1.5, 2]]),
  sample("a negative token", ("prompt 0", "token ids"), [[1, -2]]),
  sample("a token of 2^40", ("prompt 0", "token ids"), [[2**40]]),
  sample("a batch as a prompt", ("prompt 0", "token ids"), [[[1, 2], [3, 4]]]),
  sample("no key", ("needs a key", "temperature=0"), temperature=1.0),
  sample("more than positions", ("max_new_tokens", "got 20"), max_new_tokens=20),
  sample("slots without a bank", ("bank_slots", "no bank"), bank_slots=[0]),
  search("slots without a bank", ("bank_slots", "no bank"), bank_slots=[0]),
  banked("a bank without slots", ("bank_slots", "None", "a bank"), None),
  banked("too many slots", ("bank_slots", "each of 1 prompts", "got 2"), [0, 1]),
  banked("a slot outside the bank", ("slots[0] is 2", "slots 0 to 1"), [2]),
  sample("batch size -1", ("batch_size", "got -1"), batch_size=-1, key=jax.random.key(0)),
]
