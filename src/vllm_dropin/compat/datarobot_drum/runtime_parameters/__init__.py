"""Where `from datarobot_drum.runtime_parameters import RuntimeParameters` looks."""

from .runtime_parameters import RuntimeParameters

__all__ = ["RuntimeParameters"]
