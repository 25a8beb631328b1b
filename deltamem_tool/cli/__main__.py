"""`python -m deltamem_tool.cli`."""

from deltamem_tool.cli import main

main()
