"""Turn raw fMRI datasets into one store and WebDataset shards."""
