"""What a run takes of memory, disk and time: computed before it starts."""
