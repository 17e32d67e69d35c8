"""A server with OpenAI's API over `generate.batcher`. Needs the extra `serve`."""
