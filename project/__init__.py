"""Programs that use the library; each `run_*.py` and `bench_*.py` is one command."""
