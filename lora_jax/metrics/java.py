"""Runs the Java programs that pycocoevalcap ships: text in by stdin, text out by stdout.

pycocoevalcap's own wrappers write into the package's folder, print, leave pipes open and follow
the machine's locale; so the jars are called from here.
"""

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence

# METEOR lowercases and reads numbers by the locale: a Turkish machine would tell IN from in.
# Both programs read and write UTF-8 whatever the machine's encoding is.
FLAGS = ("-Duser.language=en", "-Duser.country=US", "-Xmx2G")


def why_missing() -> str | None:
  """Returns why pycocoevalcap's programs cannot run, or None if they can."""
  if importlib.util.find_spec("pycocoevalcap") is None:
    return "pycocoevalcap was not found; pip install lora-jax[metrics]"
  java = shutil.which("java")
  # macOS has a `java` that only says that there is none
  if java is None or subprocess.run([java, "-version"], capture_output=True).returncode:
    return "Java was not found; install a Java runtime 8 or newer and put `java` on the PATH"
  return None


def run_java(arguments: Sequence[str], lines: Sequence[str]) -> list[str]:
  """Writes `lines` to a Java program that answers each with one line, and returns the answers.

  Args:
    arguments: the command line after `java` and its flags.
    lines: texts without line breaks.
  Raises:
    ValueError: if a text has a line break.
    RuntimeError: if the program fails, or answers with another number of lines.
  """
  if broken := next((line for line in lines if "\n" in line), None):
    raise ValueError(f"expected texts without a line break, got {broken!r:.100}")
  text = "\n".join(lines).encode()
  run = subprocess.run(["java", *FLAGS, *arguments], input=text, capture_output=True)
  answers = run.stdout.decode().split("\n")
  answers, rest = answers[: len(lines)], answers[len(lines) :]
  if run.returncode or len(answers) < len(lines) or any(rest):
    raise RuntimeError(
      f"java {' '.join(arguments)} should answer {len(lines)} lines, one for each; it gave "
      f"{len(answers) + len(rest)} and ended with status {run.returncode}. "
      f"It said:\n{run.stderr.decode(errors='replace')[-2000:]}"
    )
  return answers
