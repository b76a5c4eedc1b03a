"""The adapter, its engine and kernels, the parts that methods are made of, and the methods."""
