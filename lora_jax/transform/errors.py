"""The error of a rule, and the one that the user sees."""


class Unsupported(Exception):
  """Raised by a rule that cannot push an operation through the factors."""


class UnsupportedOperation(NotImplementedError):
  """An operation that cannot be pushed through a factored weight."""
