"""Dialogues as training data: rows to dialogues, dialogues to ids and labels."""
