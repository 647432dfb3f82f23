"""What becomes of a run that is done, that fails, and that cannot be done."""

from experiments.harness.attempt import attempt, has_failed
from lora_jax.files import read_json


def test_a_run_is_done(tmp_path, capsys):
  def run():
    print("step 1")
    return "loss 1.5"

  assert attempt(tmp_path, run)
  assert capsys.readouterr().out == "  loss 1.5\n"
  assert not has_failed(tmp_path)


def test_training_that_is_not_finite_is_a_result(tmp_path, capsys):
  def run():
    raise FloatingPointError("the loss of step 3 is nan")

  assert attempt(tmp_path, run)
  assert has_failed(tmp_path)
  assert read_json(tmp_path / "failed.json") == {"reason": "the loss of step 3 is nan"}
  assert capsys.readouterr().out == "  failed: the loss of step 3 is nan\n"


def test_other_errors_are_shown_and_leave_nothing(tmp_path, capsys):
  def run():
    raise OSError("no such model")

  assert not attempt(tmp_path, run)
  assert "OSError: no such model" in capsys.readouterr().out
  assert not list(tmp_path.iterdir())
