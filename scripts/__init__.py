"""Commands that a user or a developer runs: demo, check, bench, the toy base."""

import train  # noqa: F401  before bitsandbytes, which it keeps quiet
