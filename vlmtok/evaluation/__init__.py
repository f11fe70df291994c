"""Measuring what methods keep: tasks, sweeps over methods and budgets, statistics, tables."""
