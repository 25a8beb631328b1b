from cli.chatting import engine, here, talk  # noqa: F401
