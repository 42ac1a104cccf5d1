"""The variants of custom.py that `init` copies, each whole by itself: a folder has nothing of ours to import."""
