"""Miniature copies of the official layouts from a known world."""
