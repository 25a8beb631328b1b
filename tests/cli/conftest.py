from cli.chatting import engine, talk, working_folder  # noqa: F401
