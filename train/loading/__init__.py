"""A base model's files: finding them, reading them, quantising, and what comes of them."""
