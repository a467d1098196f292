"""What a run is: one module a recipe, each `run(config, ..., workdir)`, all around the same loop."""
