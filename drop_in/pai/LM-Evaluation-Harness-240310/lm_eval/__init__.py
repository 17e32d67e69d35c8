"""Stands for the package that Pai-Megatron-Patch bundles."""
