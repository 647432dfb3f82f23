"""What a rule raises, and what the user sees of it."""


class Unsupported(Exception):
  """Raised by a rule that cannot push an operation through the factors."""


class UnsupportedOperation(NotImplementedError):
  """An operation that cannot be pushed through a factored weight."""
