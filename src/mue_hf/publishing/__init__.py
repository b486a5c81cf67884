"""Checkpoints with their model card, in a folder or on the Hub."""
