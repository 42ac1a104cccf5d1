"""A stand-in for the part of `datarobot_drum` that custom.py files use, for when the real package is not installed.

Written from the documented behaviour and from watching it; it shares no code with the real one.
"""

from .runtime_parameters import RuntimeParameters

__all__ = ["RuntimeParameters"]
