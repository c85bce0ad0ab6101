"""Commands that a user or a developer runs: demo, check, bench, the toy base."""
