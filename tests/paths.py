"""Where the tests find things: the checkout, expected values, and data that only some have."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"  # beside the checkout of the developers; tests skip without it
