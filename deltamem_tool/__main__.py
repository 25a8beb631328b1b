"""Run `deltamem` as `python -m deltamem_tool`, which launchers such as torchrun need."""

from deltamem_tool.cli import main

if __name__ == "__main__":
    main()
