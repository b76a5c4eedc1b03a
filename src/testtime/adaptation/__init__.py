"""The adapter, its engine, the parts that methods are made of, and the methods."""
