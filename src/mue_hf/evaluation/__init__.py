"""What `mue-hf evaluate` is made of: the rows, the settings that are compared, and the figures of each."""
