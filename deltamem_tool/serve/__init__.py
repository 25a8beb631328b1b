"""An HTTP server for many users, each with their own memory, on one loaded model.

Start with `app`, which has the routes, and `turns`, which answers one turn. `batching` runs the model, `store` keeps
the memories, and `openai` implements OpenAI's API.
"""
