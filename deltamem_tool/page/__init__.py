"""Build a web page that runs a model in the visitor's browser, as a folder for any static host."""
