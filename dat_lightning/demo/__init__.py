"""The demonstration: both stages on handwritten digits, judged by one protocol and shown in one report."""
