"""Hypothesis on shared machines: no deadline for one example, no database in the checkout."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("shared", deadline=None, database=None)
settings.load_profile("shared")
