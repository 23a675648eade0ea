"""Speed of a Stage-2 step and of a generation chain, against a plain implementation of the same method."""
