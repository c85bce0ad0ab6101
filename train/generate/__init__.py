"""Pictures from a base and adapters, without a run: the command `kindling generate`."""
