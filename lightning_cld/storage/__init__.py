"""The files that the library writes, and the provenance stored in them."""
