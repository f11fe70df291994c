"""Counting: plans, conventions, overhead, reports."""
