"""Tiny random models of every family and tower that vlmtok carries, built from configs of the installed libraries.

No weights are loaded and nothing is downloaded; a model is made in a fraction of a second, always the same. They are
what `vlmtok doctor` and the tests run. A library is imported when one of its models is built.
"""
