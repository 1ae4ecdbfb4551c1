"""Arrays of other libraries: shared memory, and attention for them."""
