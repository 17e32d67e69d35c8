"""`tessel selftest`: whether this machine computes what it should, and how fast."""
