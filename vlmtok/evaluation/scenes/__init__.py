"""The little rendered world that tasks ask about: pictures, questions, answers."""

from .questions import KINDS, Asked, exam

__all__ = ["KINDS", "Asked", "exam"]
