"""The user's datasets and loaders: which they are, the same samples in order, and the loader of a coreset."""
