"""Tests of the GPU code, on a GPU or in numba's simulator (see conftest.py)."""
