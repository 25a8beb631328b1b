"""The endpoints of OpenAI's API: chat completions, responses and models."""
