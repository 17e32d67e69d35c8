"""The decoder as single-device PyTorch: no rank, group or mesh in here."""
