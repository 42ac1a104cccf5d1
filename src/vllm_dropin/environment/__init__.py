"""The image that a platform builds: what goes into it, and the proof that it is what it says."""
