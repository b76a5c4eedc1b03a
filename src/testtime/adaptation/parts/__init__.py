"""The parts that methods are made of: one question each, small, and tested alone."""
