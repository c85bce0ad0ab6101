"""Pictures and captions to latents and embeddings, before training, in a cache on disk."""
