"""Experiments are tested as without Java, which METEOR takes seconds to start.

tests/metrics compares METEOR, ROUGE-L and CIDEr with the official scorer.
"""

import pytest

from lora_jax.metrics import java


@pytest.fixture(autouse=True, scope="module")
def without_java():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(java, "why_missing", lambda: "Java was not found")
    yield
