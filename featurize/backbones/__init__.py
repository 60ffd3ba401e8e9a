"""Frozen networks with their exact preprocessing."""
