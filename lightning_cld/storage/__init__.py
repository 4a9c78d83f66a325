"""The files that the library writes, and what they say of where they come from."""
