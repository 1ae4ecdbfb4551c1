"""Programs that use the library; each `run_*.py` is one command, benchmarks are in `bench/`."""
