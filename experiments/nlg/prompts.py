"""The formats of E2E examples, and of the prompts for generation.

    separator   context END " " completion END    as in Hu et al.'s code
    newline     context "\\n" completion END
    chat        the model's chat template; the user's message is an instruction and the context

END is the end token of the model's tokenizer. `<|endoftext|>`, which ends documents, may be another
token, and so may the padding token: padding is masked by position, never by token.
"""

from collections.abc import Sequence

from experiments.nlg import user_data
from experiments.nlg.base import Base
from lora_jax.data import text
from lora_jax.data.jsonl import Completion, Conversation
from lora_jax.data.sets.e2e import Record

INSTRUCTION = "Describe this place in one or two sentences that state all of its attributes: "


def encode(base: Base, records: Sequence[Record], limit: int) -> list[text.Example]:
  """Returns examples in the base model's format, of at most `limit` tokens each."""
  if base.prompt == "separator":
    return text.encode(base.tokenizer, records, base.end_of_text, limit, truncate=True)
  return user_data.encode(base.text, _as_user_data(base, records), limit, truncate=True)


def encode_prompts(
  base: Base, contexts: Sequence[str], shots: Sequence[Record] = ()
) -> list[list[int]]:
  """Returns the tokens of prompts for generation.

  Args:
    base: the model, with its prompt format.
    contexts: the inputs.
    shots: solved examples that come before each input.
  """
  if base.prompt == "separator":
    prompts = text.encode_context(base.tokenizer, contexts, base.end_of_text)
    limit = base.model.num_positions
    solved = [[*shot.tokens, base.end_of_text] for shot in encode(base, shots, limit)]
    return [[*(token for ids in solved for token in ids), *prompt] for prompt in prompts]
  records = [Record(context, "-") for context in contexts]  # a prompt ends before the completion
  return user_data.prompts(base.text, _as_user_data(base, records, shots))


def end_ids(base: Base) -> tuple[int, ...]:
  """Returns the tokens that end a text: the model's end tokens, and line breaks of one token.

  A text is one line. With a separator it may start with a line break, and ends at a blank line.
  """
  breaks = ("\n\n",) if base.prompt == "separator" else ("\n", "\n\n")
  encoded = [base.tokenizer.encode(part, add_special_tokens=False).ids for part in breaks]
  ids = (*base.text.end_ids, *(ids[0] for ids in encoded if len(ids) == 1))
  return tuple(dict.fromkeys((base.end_of_text, *ids)))


def as_line(base: Base, generated: str) -> str:
  """Returns a generated text up to its end, as one line."""
  end = "\n\n" if base.prompt == "separator" else "\n"
  return " ".join(generated.split(end)[0].splitlines()).strip()


def _as_user_data(
  base: Base, records: Sequence[Record], shots: Sequence[Record] = ()
) -> list[Completion] | list[Conversation]:
  if base.prompt == "newline":
    before = "".join(f"{shot.context}\n{shot.completion}\n\n" for shot in shots)
    return [
      Completion(f"record {i}", f"{before}{record.context}\n", record.completion)
      for i, record in enumerate(records)
    ]
  before = [message for shot in shots for message in _messages(shot)]
  return [
    Conversation(f"record {i}", [*before, *_messages(record)]) for i, record in enumerate(records)
  ]


def _messages(record: Record) -> list[dict[str, str]]:
  return [
    {"role": "user", "content": INSTRUCTION + record.context},
    {"role": "assistant", "content": record.completion},
  ]
