"""Checkpoints of others, and folders for others: import, export, from_pretrained."""
