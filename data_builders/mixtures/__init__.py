"""Mixtures of sources: what a spec says, what it comes to in rows, their order, and the plan on disk."""
