"""What an evaluation leaves behind: a file, tables, pictures, a page."""
