"""The model itself: flat files that import each other, torch and what transformers
itself needs, so that a checkpoint can carry copies of them.
"""
