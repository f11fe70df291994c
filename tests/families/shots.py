"""Pictures of the tiny families, under the names that these tests use."""

from vlmtok.lab.tiny.shots import GLM_VIDEO, PATCH, SIDE, AnyRes, packed_clip, plain

__all__ = ["GLM_VIDEO", "PATCH", "SIDE", "AnyRes", "packed_clip", "plain"]
