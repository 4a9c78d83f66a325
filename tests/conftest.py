"""Settings of every test."""

import os

# Before torch is imported: the models here are too small for threads, which only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
