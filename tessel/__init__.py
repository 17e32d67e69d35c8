"""tessel: from a Hugging Face model and raw text to a trained Hugging Face model, in Megatron's vocabulary."""

__version__ = "0.1.0"
