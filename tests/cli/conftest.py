from cli.chatting import engine, here, talk  # noqa: F401
from cli.command import deltamem  # noqa: F401
