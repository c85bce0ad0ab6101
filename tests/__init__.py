"""Kindling's tests."""

import train  # noqa: F401  before bitsandbytes, which it keeps quiet
