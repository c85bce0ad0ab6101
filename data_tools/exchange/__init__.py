"""Data sets in other containers, in and out: parquet, WebDataset tar, the hub."""
