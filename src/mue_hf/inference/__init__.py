"""Rows of any source through a model: predictions with their depths, bulk runs, and what they cost."""
