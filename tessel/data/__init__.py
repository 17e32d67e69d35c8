"""Tokens: from text to indexed files, from indexed files to batches."""
