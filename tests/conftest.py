"""Settings for all tests."""

import os

# Set before torch is imported. The models here are so small that threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
