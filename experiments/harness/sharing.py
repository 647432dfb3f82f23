"""Does planned runs that several processes may share: each claims the folder of a run it does."""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PLANNED = "planned.json"
"""In the folder of a run that is finished or has failed: what it is in its plan; written last."""

WAIT = 2.0  # seconds, before looking for the runs of another process again


class Task(NamedTuple):
  """A planned run.

  Attributes:
    folder: of the run.
    check: raises ValueError if the run in the folder has other settings.
    do: does the run, and writes `PLANNED`; returns whether it could be done.
  """

  folder: Path
  check: Callable[[], None]
  do: Callable[[], bool]


def carry_out(tasks: Iterable[Task]) -> list[str]:
  """Does tasks that are not done yet; returns the folders of those that could not be done.

  One that another process does now is waited for.

  Raises:
    ValueError: if a folder has a run with other settings.
  """
  broken, left = list[str](), list(tasks)
  while left:
    taken = []
    for task in left:
      if is_done(task.folder):
        task.check()
        continue
      with claimed(task.folder) as is_free:
        if not is_free:
          taken.append(task)
        elif not (is_done(task.folder) or task.do()):
          broken.append(str(task.folder))
    left = taken
    if left:
      time.sleep(WAIT)
  return broken


def is_done(folder: Path) -> bool:
  """Tells whether a planned run is finished, or has failed."""
  return (folder / PLANNED).exists()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
  """Claims a folder for this process; tells whether no other process has."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / ".claim").open("a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      is_free = True
    except BlockingIOError:
      is_free = False
    yield is_free
