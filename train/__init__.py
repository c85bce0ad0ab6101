"""The trainer: config, base models, encoding, training, checkpoints, export."""
