"""The HTTP server: OpenAI's interface in front of an engine in processes of its own. Needs the ``serve`` extra."""
