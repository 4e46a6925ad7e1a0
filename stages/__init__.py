"""The stages: one thin click command a file. Load the recipe, call one library function, set the exit status."""
