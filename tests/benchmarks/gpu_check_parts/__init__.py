"""Parts for the tests of the GPU check: one that ends, one that crashes, one that hangs."""
