"""A run's folder: allowed changes of its config, repeated steps, and removed leftovers."""

import errno
import io
import json
import os

import pytest

from experiments.configs import gpt2_e2e
from experiments.harness.config import read_config, replace_fields
from experiments.harness.workdir import check_same, open_workdir, read_result, run_once, write_json
from experiments.nlg.config import E2EConfig, TemplateConfig


def config(workdir, **fields):
  return replace_fields(
    read_config(E2EConfig, gpt2_e2e.get_config()), {"workdir": str(workdir), **fields}
  )


def result_of(settings):
  """Returns a run's result, and whether it is new."""
  calls = []

  def make(workdir):
    calls.append(workdir)
    return {"beams": settings.decoding.num_beams, "train_seconds": len(calls), "train_tokens": 0}

  return run_once(settings, make), bool(calls)


def trained(folder, step=8):
  (folder / "checkpoints" / str(step)).mkdir(parents=True)
  (folder / "metrics.jsonl").write_text('{"step": 8}\n')


def test_what_follows_training_may_change_and_is_repeated(tmp_path):
  first = config(tmp_path)
  write = {"train_seconds": 99, "train_tokens": 7}
  result, is_new = result_of(first)
  assert is_new
  write_json(tmp_path / "result.json", result | write)
  trained(tmp_path)
  other = config(tmp_path, **{"decoding.num_beams": 3})
  result, is_new = result_of(other)
  assert is_new
  assert result == {"beams": 3, **write}  # training's own figures outlive the repetition
  assert json.loads((tmp_path / "config.json").read_text())["decoding"]["num_beams"] == 3
  assert result_of(other) == (result, False)
  other_mesh = {"decoding.num_beams": 3, "mesh.fsdp": 2}
  assert result_of(config(tmp_path, **other_mesh)) == (result, False)
  with pytest.raises(ValueError, match=r"another config: optimizer\.b1=0\.9 there, 0\.8 now"):
    result_of(config(tmp_path, **{"optimizer.b1": 0.8}))


def test_a_wrong_setting_after_training_can_be_corrected(tmp_path):
  def fails(workdir):
    trained(workdir)
    raise ValueError("no such inputs")

  with pytest.raises(ValueError, match="no such inputs"):
    run_once(config(tmp_path, **{"decoding.num_inputs": 9}), fails)
  assert result_of(config(tmp_path)) == ({"beams": 10, "train_seconds": 1, "train_tokens": 0}, True)


def test_a_repetition_that_fails_leaves_the_result(tmp_path):
  result, _ = result_of(config(tmp_path))
  trained(tmp_path)

  def fails(workdir):
    raise RuntimeError

  with pytest.raises(RuntimeError):
    run_once(config(tmp_path, **{"decoding.num_beams": 3}), fails)
  assert result_of(config(tmp_path)) == (result, False)


def test_without_checkpoints_nothing_is_trained_again(tmp_path):
  result_of(config(tmp_path))
  (tmp_path / "metrics.jsonl").write_text("")
  with pytest.raises(ValueError, match=r"cannot be repeated without .*checkpoints, which is gone"):
    result_of(config(tmp_path, **{"decoding.num_beams": 3}))


def test_a_finished_run_is_only_read(tmp_path, monkeypatch):
  result, _ = result_of(config(tmp_path))
  check_same(tmp_path / "data.json", "digest", "data")
  before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  opened = io.open  # which pathlib calls

  def read_only(path, mode="r", *args, **options):
    if set(mode) & set("wax+"):
      raise PermissionError(errno.EACCES, "Permission denied", path)
    return opened(path, mode, *args, **options)

  with monkeypatch.context() as patched:
    patched.setattr(io, "open", read_only)
    with pytest.raises(PermissionError):
      (tmp_path / "other").write_text("")
    assert result_of(config(tmp_path)) == (result, False)
    check_same(tmp_path / "data.json", "digest", "data")
  assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_what_killed_processes_left_is_removed(tmp_path):
  for name in (".peft-x1", ".model-x2", ".base-x3", "adapter_frozen.orbax-checkpoint-tmp-4"):
    (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / name / "sub" / "file").write_bytes(b"0" * 10)
  for name in (".result.json.new", ".hidden", "peft-mine"):
    (tmp_path / name).write_text("")
  with open_workdir(config(tmp_path)):
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".lock", "config.json", "peft-mine"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("saved", [False, True])
def test_a_full_disk_is_one_line(tmp_path, code, saved):
  """Wherever it happens: predictions, a safetensors file, a result."""

  def full(workdir):
    if saved:
      (workdir / "checkpoints" / "6").mkdir(parents=True, exist_ok=True)
    raise OSError(code, os.strerror(code))

  kept = r"is saved up to step 6 \(" if saved else "no checkpoint was saved"
  with pytest.raises(OSError, match=rf"a file in {tmp_path} could not .*; .*{kept}.*Make room"):
    run_once(TemplateConfig(workdir=str(tmp_path)), full)

  def rust(workdir):
    raise RuntimeError(f"I/O error: {os.strerror(code)} (os error {code})\nmore")

  def adapter(workdir):
    raise OSError(f"the adapter could not be written to X ({os.strerror(code)}). More.")

  message = rf"^the adapter could not be written to X \({os.strerror(code)}\); .*{kept}"
  with pytest.raises(OSError, match=message):
    run_once(TemplateConfig(workdir=str(tmp_path)), adapter)
  with pytest.raises(OSError, match=kept) as caught:
    run_once(TemplateConfig(workdir=str(tmp_path)), rust)
  assert "\n" not in str(caught.value)


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
  def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "replace", full)
  path = tmp_path / "result.json"
  with pytest.raises(OSError, match=r"No space left on device: '.*result\.json'"):
    write_json(path, {})
  assert read_result(tmp_path) is None
  assert not list(tmp_path.iterdir())
