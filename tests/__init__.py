"""The tests are a package: shared parts are imported as `tests.references` and the like."""
