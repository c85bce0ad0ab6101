"""Data tools: read, check, caption and bucket pictures."""
