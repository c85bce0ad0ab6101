"""The loss on held-out pictures: which, how, and what it says."""
