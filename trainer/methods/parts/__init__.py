"""The parts that methods are made of: losses with what they own."""
