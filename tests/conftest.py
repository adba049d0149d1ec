"""Shared by all tests: few threads, so that parallel test processes do not fight for the cores."""

import os

# Before torch or numpy is imported anywhere: both read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Tests never look at a web page to update progress on, nor report usage to anybody.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
