"""Crossing to a network without internet: the model side (bundle) and the proof before the cluster (verify)."""
