from cli.command import deltamem  # noqa: F401
