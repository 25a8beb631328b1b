from deltamem_tool.cli import main

main()
