"""llama.cpp for the tests, and a table of what they measured."""

import pytest

from tests.served.llama_cpp import LlamaCpp, missing

LINES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def llama_cpp():
  """One process for all tests; skips them if llama.cpp is not installed."""
  if reason := missing():
    pytest.skip(reason)
  process = LlamaCpp()
  yield process
  process.close()


@pytest.fixture
def report(request):
  """Takes a line for the table that is printed after the tests."""
  return request.config.stash.setdefault(LINES, []).append


def pytest_terminal_summary(terminalreporter, config):
  if lines := config.stash.get(LINES, []):
    terminalreporter.section("llama.cpp and lora_jax")
    terminalreporter.write("\n".join([*lines, ""]))
