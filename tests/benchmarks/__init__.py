"""Measurements; no tests. docs/performance.md has results."""
