"""Measurement: the studies, the ledgers and the report, and the command line."""
