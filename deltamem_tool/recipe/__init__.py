"""What a training run is to do: the options of a recipe, and how a file of them is read."""
