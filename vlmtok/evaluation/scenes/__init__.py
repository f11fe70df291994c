"""The little rendered world that tasks ask about: pictures, questions, answers."""
