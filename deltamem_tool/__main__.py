"""`python -m deltamem_tool` is `deltamem`: how launchers such as torchrun start it."""

from deltamem_tool.cli import main

if __name__ == "__main__":
    main()
