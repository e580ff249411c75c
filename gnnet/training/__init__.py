"""The only package that knows Lightning beside the data module: the module that learns, and its callbacks."""
